import pytest
import torch

from nnx_cli.errors import CheckpointError
from nnx_cli.runs.tensors import load_weights, read_tensors
from nnx_cli.system import files


def test_what_is_no_safetensors_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"", b"PK\x03\x04", (2**62).to_bytes(8, "little") + b"{}", b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            read_tensors(path, files.sha256_file(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tiny, tmp_path, value):
    model = tiny()
    state = {key: tensor.clone() for key, tensor in model.state_without_ties().items()}
    state["norm.weight"][3] = value
    with pytest.raises(CheckpointError, match="norm.weight has elements that are not finite"):
        load_weights(model, state, tmp_path, torch.device("cpu"))
    assert model.norm.weight.isfinite().all(), "nothing was taken over"


def test_weights_of_another_model_are_refused(tiny, tmp_path):
    model = tiny()
    state = model.state_without_ties()
    for other in (
        tiny(dim=64).state_without_ties(),
        tiny("llama").state_without_ties(),
        tiny(n_layers=1).state_without_ties(),
        {},
    ):
        with pytest.raises(CheckpointError, match="belongs to another model"):
            load_weights(model, other, tmp_path, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="no match for x$"):
        load_weights(model, state | {"x": torch.ones(1)}, tmp_path, torch.device("cpu"))
