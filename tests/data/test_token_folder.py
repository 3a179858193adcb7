import json

import numpy as np
import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.data.tokenizers.hf_json import save_tokenizer
from nnx_cli.errors import DataError

TEXT = "".join(f"Zeile {i}: größer\n" for i in range(200))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    prepare([tmp_path / "a.txt"], tmp_path / "made", PrepareConfig())
    return tmp_path / "made"


def refusal(folder, **options) -> DataError:
    with pytest.raises(DataError) as error:
        open_token_folder(folder, **options)
    assert error.value.exit_code == 3 and str(folder) in str(error.value)
    return error.value


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def test_reads_what_was_written(folder):
    data = open_token_folder(folder)
    assert bytes(data.train) + bytes(data.val) == TEXT.encode()
    assert (data.vocab_size, data.tokenizer.kind, data.train.dtype) == (256, "byte", np.uint8)
    assert data.text_bytes == len(TEXT.encode()) == sum(data.meta["text_bytes"].values())
    assert data.meta["format"] == 1 and data.meta["tokens"] == {"train": len(data.train), "val": len(data.val)}
    assert open_token_folder(folder, build_tokenizer("byte"), verify=False).fingerprint == data.fingerprint


def test_fingerprint_follows_data_and_tokenizer(folder, tmp_path):
    (tmp_path / "b.txt").write_bytes(TEXT.encode()[:-2] + b"!\n")
    prepare([tmp_path / "b.txt"], tmp_path / "other", PrepareConfig())
    assert open_token_folder(tmp_path / "other").fingerprint != open_token_folder(folder).fingerprint


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1] + b"\x00", lambda b: b[:-1], lambda b: b + b"x", lambda b: b""])
def test_damaged_tokens_are_refused(folder, name, damage):
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    assert name in str(refusal(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"dtype": "uint16"},
        {"dtype": ["x"]},
        {"vocab_size": 255},
        {"vocab_size": None},
        {"tokens": {}},
        {"tokens": {"train": -1}},
        {"tokens": 5},
        {"sha256": None},
        {"sha256": {}},
        {"text_bytes": {"train": "1"}},
        {"tokenizer": {}},
        {"tokenizer": 1},
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_damaged_meta_is_refused(folder, changes, verify):
    change_meta(folder, **changes)
    refusal(folder, verify=verify)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_meta_that_is_no_object_is_refused(folder, content):
    (folder / "meta.json").write_bytes(content)
    refusal(folder)


def test_another_tokenizer_is_refused(folder):
    char = build_tokenizer("char", sample=iter(["abc"]))
    assert "another tokenizer" in str(refusal(folder, tokenizer=char))
    save_tokenizer(char, folder / "tokenizer.json")
    assert "tokenizer.json" in str(refusal(folder))
    (folder / "tokenizer.json").unlink()
    refusal(folder)


def test_missing_folder_names_the_command(tmp_path):
    assert refusal(tmp_path / "nothing").fix.startswith("nnx prepare FILE --out")
    assert "holds no prepared tokens" in str(refusal(tmp_path))


# nanoGPT


@pytest.fixture
def nanogpt(tmp_path):
    np.array([0, 5, 64, 3], "<u2").tofile(tmp_path / "train.bin")
    np.array([1, 2], "<u2").tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(b"never opened")
    return tmp_path


def test_nanogpt_folder(nanogpt):
    data = open_token_folder(nanogpt)
    assert (data.vocab_size, data.tokenizer, data.text_bytes) == (65, None, None)
    assert data.train.tolist() == [0, 5, 64, 3] and data.val.tolist() == [1, 2]
    np.array([50256, 2], "<u2").tofile(nanogpt / "val.bin")
    assert open_token_folder(nanogpt).vocab_size == 50304
    assert open_token_folder(nanogpt).fingerprint != data.fingerprint


def test_nanogpt_folder_with_a_tokenizer(nanogpt):
    data = open_token_folder(nanogpt, build_tokenizer("byte"))
    assert (data.vocab_size, data.tokenizer.kind, data.text_bytes) == (256, "byte", 6)
    np.array([256], "<u2").tofile(nanogpt / "val.bin")
    assert "id 256" in str(refusal(nanogpt, tokenizer=build_tokenizer("byte")))


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_nanogpt_folder_of_half_ids_is_refused(nanogpt, content):
    (nanogpt / "val.bin").write_bytes(content)
    refusal(nanogpt)
