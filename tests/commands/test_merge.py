import json

import pytest
import torch

from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model
from nnx_cli.runs.run import Run

ADAPT = [
    "--init-from",
    "words",
    "--data",
    "data/words",
    "--lora-rank",
    4,
    "--max-steps",
    6,
    "--save-every",
    2,
    "--val-every",
    3,
    "--sample-every",
    0,
    "--batch-size",
    4,
    "--grad-accum",
    1,
    "--threads",
    1,
    "--lr",
    0.01,
    "--out",
    "weights/adapted",
]


@pytest.fixture
def adapted(nnx, run):
    result = nnx("train", *ADAPT, "--json")
    assert result.exit_code == 0, result.stderr
    return Run(find_model("adapted").folder)


def test_only_the_adapter_is_trained(adapted, run):
    base, tuned = (find_model(name).weights()[1] for name in ("words", "adapted"))
    new = tuned.keys() - base.keys()
    assert new and all(name.endswith(("lora_a", "lora_b")) for name in new)
    assert all(torch.equal(base[name], tuned[name]) for name in base)
    assert any(tuned[name].abs().sum() > 0 for name in new if name.endswith("lora_b"))
    optimizer = {name.rpartition(".")[0] for name in adapted.newest_checkpoint()[0].optimizer}
    assert optimizer == new


def test_merged_and_adapted_models_agree(nnx, adapted):
    product = json.loads(nnx("merge", "adapted", "--json").stdout)
    assert product.keys() == {"out", "parameters", "largest_logit_difference"}
    assert product["largest_logit_difference"] < 1e-4
    merged, tuned = (load_model(find_model(name), torch.device("cpu")) for name in (product["out"], "adapted"))
    ids = torch.randint(256, (2, 32))
    assert (merged(ids) - tuned(ids)).abs().max() < 1e-4
    assert sum(p.numel() for p in merged.parameters()) == product["parameters"]
    assert nnx("eval", product["out"]).exit_code == 0
    assert nnx("quantize", product["out"], "--max-drop", 1).exit_code == 0


def test_an_adapter_resumes_with_the_same_bits(nnx, adapted):
    halfway = [*ADAPT[:-1], "weights/halfway"]
    assert nnx("train", *halfway).exit_code == 0
    import shutil

    shutil.rmtree("weights/halfway/checkpoints/step-00000006")
    Run(find_model("halfway").folder).set_status(status="interrupted")
    assert nnx("train", "--resume", "halfway").exit_code == 0
    once, again = (find_model(f"{name}@last").weights()[1] for name in ("adapted", "halfway"))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_what_adapters_refuse(refused, adapted):
    refused(2, "--lora-rank trains adapters of an existing model", "train", "--lora-rank", 4, "--data", "data/words")
    for rank in (32, 33, 5000):
        words = ["train", "--init-from", "words", "--data", "nothing", "--lora-rank", rank]
        assert "--lora-rank 16 or less" in refused(2, f"--lora-rank {rank} is no low rank", *words).stderr
    refused(2, "carries no adapter", "merge", "words")
    refused(2, "carries an adapter", "quantize", "adapted")
    refused(5, "adapted has adapters", "train", "--init-from", "adapted", "--data", "data/words")
    refused(8, "exists already", "merge", "adapted", "--out", "weights/words")
