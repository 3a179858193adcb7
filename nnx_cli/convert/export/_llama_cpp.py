"""llama.cpp itself, as the package xllamacpp brings it, on the CPU."""

from __future__ import annotations

import http.client
import importlib.util
import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnx_cli.errors import QualityError

PACKAGE = "xllamacpp"
LIKELIEST = 256  # tokens whose log-probability is asked for


def is_installed() -> bool:
    """Whether the package is."""
    return importlib.util.find_spec(PACKAGE) is not None


class LlamaCpp:
    """A GGUF file in llama.cpp. Raises QualityError where that does not take it, or a question about it."""

    def __init__(self, path: Path, n_positions: int) -> None:
        import xllamacpp

        how = xllamacpp.CommonParams()
        how.model.path = str(path)
        how.n_ctx, how.n_gpu_layers, how.verbosity = n_positions, 0, 0
        how.warmup = how.ui = False
        how.cpuparams.n_threads = torch.get_num_threads()
        try:
            self._server = xllamacpp.Server(how)
        except RuntimeError as error:
            raise QualityError("llama.cpp does not load the file") from error

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, which holds no special tokens."""
        answer = self._ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})
        return np.array(answer["tokens"], np.int64)

    def continued(self, prompt: list[int], n: int) -> tuple[list[int], list[dict[int, float]]]:
        """The `n` tokens that follow by greedy decoding, also beyond an end of text, and log-probabilities of the
        likeliest tokens at the first places: llama.cpp tells none where a character is half written."""
        asked = {"temperature": 0, "top_k": 1, "n_probs": LIKELIEST, "return_tokens": True}
        chosen: list[int] = []
        likeliest: list[dict[int, float]] = []
        while len(chosen) < n:
            answer = self._ask("/completion", asked | {"prompt": prompt + chosen, "n_predict": n - len(chosen)})
            if len(likeliest) == len(chosen):
                told = zip(answer["tokens"], answer.get("completion_probabilities", ()), strict=False)
                known = takewhile(lambda pair: pair[0] == pair[1]["id"], told)
                likeliest += [{top["id"]: top["logprob"] for top in place["top_logprobs"]} for _, place in known]
            chosen += answer["tokens"]
        return chosen, likeliest

    def _ask(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """What the server in this process answers, which only this machine reaches. Its other door, without HTTP, keeps
        ids of half-written characters back."""
        connection = http.client.HTTPConnection(self._server.listening_address.partition("//")[2])
        try:
            connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException) as error:
            raise QualityError(f"llama.cpp gives no answer about the file: {error}") from error
        finally:
            connection.close()
        if "error" in answer:
            raise QualityError(f"llama.cpp does not run the file: {answer['error'].get('message')}")
        return answer
