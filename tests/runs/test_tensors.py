import json

import pytest
import safetensors.torch
import torch

from nnx_cli.errors import CheckpointError, is_out_of_memory
from nnx_cli.runs.tensors import DTYPES, load_weights, read_tensors, write_tensors
from nnx_cli.system import files


def test_what_is_no_safetensors_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"", b"PK\x03\x04", (2**62).to_bytes(8, "little") + b"{}", b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            read_tensors(path, files.sha256_file(path))


def test_tensors_are_those_that_the_library_reads_and_writes(tmp_path):
    made = {str(dtype): torch.arange(15).reshape(3, 5).to(dtype) for dtype in DTYPES}
    made |= {"one": torch.tensor(3.5), "none": torch.empty(0, 4), "large": torch.randn(3, 2**20)}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    digest = write_tensors(ours, made, {"a": "b"})
    safetensors.torch.save_file(made, theirs)
    assert digest == files.sha256_file(ours)
    for found in (read_tensors(ours, "", digest), read_tensors(theirs, files.sha256_file(theirs))):
        assert found.keys() == made.keys()
        assert all(found[name].dtype == made[name].dtype and found[name].equal(made[name]) for name in made)
    assert safetensors.torch.load_file(ours).keys() == made.keys()


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F8_E4M3"},
        {"dtype": ["F32"]},
        {"shape": [3]},
        {"shape": [-2, -1]},
        {"shape": [2.0]},
        {"shape": [0, 2**62, 2**62], "data_offsets": [8, 8]},
        {"shape": [1] * 70 + [2]},
        {"shape": [10**4000] * 200},
        {"shape": 2},
        {"data_offsets": [8, 8]},
        {"data_offsets": [4, 16]},
        {"data_offsets": [0]},
    ],
)
def test_tensors_that_do_not_fill_their_file_are_refused(tmp_path, change):
    entries = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    entries["b"] = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]} | change
    head = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(16))
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(path, files.sha256_file(path))


def test_a_changed_byte_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    digest = write_tensors(path, {"a": torch.arange(3 * 2**20)})
    content = bytearray(path.read_bytes())
    for place in (9, len(content) // 2, -1):
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            read_tensors(path, digest)
        content[place] ^= 1


def test_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    path = tmp_path / "model.safetensors"
    digest = write_tensors(path, {"a": torch.arange(3)})
    monkeypatch.setattr("nnx_cli.runs.tensors.torch.empty", refuse)
    with pytest.raises(RuntimeError) as caught:
        read_tensors(path, digest)
    assert is_out_of_memory(caught.value)


def test_a_thread_that_cannot_start_is_done_without(tmp_path, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    path, made = tmp_path / "model.safetensors", {"a": torch.arange(3 * 2**20), "b": torch.ones(2)}
    monkeypatch.setattr("threading.Thread.start", refuse)
    digest = write_tensors(path, made)
    found = read_tensors(path, digest)
    monkeypatch.undo()
    assert digest == files.sha256_file(path) and all(found[name].equal(made[name]) for name in made)


def test_tensors_are_read_to_the_cpu_whatever_device_is_the_default(tmp_path):
    digest = write_tensors(tmp_path / "x", {"a": torch.arange(3)})
    with torch.device("meta"):
        assert read_tensors(tmp_path / "x", digest)["a"].tolist() == [0, 1, 2]


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
