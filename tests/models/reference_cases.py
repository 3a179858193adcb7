"""Numbers recorded from the original code of an architecture: MODEL.parity.json and the tensors beside it."""

import json
from pathlib import Path

from safetensors.torch import load_file

FOLDER = Path(__file__).parent


def load_case(model, case):
    """The case's entry in the JSON, its weights, its gradients (None where there are none) and its other tensors."""
    entry = json.loads((FOLDER / f"{model}.parity.json").read_text())["cases"][case]
    tensors = load_file(FOLDER / entry["file"])

    def cut(prefix):
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    data = {name: tensors[key] for name, key in entry["tensors"].items()}
    return entry, cut(entry["weights_prefix"]), cut(entry["grads_prefix"]) if "grads_prefix" in entry else None, data
