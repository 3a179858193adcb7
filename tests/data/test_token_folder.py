import hashlib
import json
import os

import numpy as np
import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data import token_folder
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.data.tokenizers.hf_json import save_tokenizer
from nnx_cli.errors import DataError
from nnx_cli.system import files
from nnx_cli.system.files import sha256_file

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
    assert data.meta["format"] == 2 and data.meta["tokens"] == {"train": len(data.train), "val": len(data.val)}
    assert open_token_folder(folder, build_tokenizer("byte")).fingerprint == data.fingerprint


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
        {"format": 3},
        {"format": 0},
        {"format": True},
        {"format": "2"},
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
def test_damaged_meta_is_refused(folder, changes):
    change_meta(folder, **changes)
    refusal(folder)


def as_format_1(folder):
    """What the version before wrote."""
    digests = json.loads((folder / "meta.json").read_text())["sha256"]
    for split in ("train", "val"):
        (folder / f"{split}.documents").unlink()
        del digests[f"{split}.documents"]
    change_meta(folder, format=1, sha256=digests)


def test_format_1_is_read_as_one_document(folder):
    before = open_token_folder(folder)
    as_format_1(folder)
    data = open_token_folder(folder)
    assert {split: starts.tolist() for split, starts in data.documents.items()} == {"train": [0], "val": [0]}
    assert data.fingerprint == before.fingerprint and data.mask is None
    assert bytes(data.train) == bytes(before.train)


def test_the_fingerprint_is_that_of_the_tokens_and_the_tokenizer(folder):
    data = open_token_folder(folder)
    parts = [hashlib.sha256(ids.tobytes()).hexdigest() for ids in (data.train, data.val)]
    wanted = hashlib.sha256("\n".join([*parts, data.tokenizer.fingerprint]).encode()).hexdigest()
    assert data.fingerprint == wanted


def test_another_format_names_both_numbers(folder):
    change_meta(folder, format=3)
    assert "format 3; this version of nnx reads 1 to 2" in str(refusal(folder))


@pytest.mark.parametrize("name", ["train.documents", "val.documents"])
@pytest.mark.parametrize(
    "starts", [[], [1], [0, 5, 5], [0, 9, 5], [0, 10**6], [0, 2**63 + 5], [0, 3]], ids=lambda starts: str(starts)
)
def test_damaged_documents_are_refused(folder, name, starts):
    np.array(starts, "<u8").tofile(folder / name)
    assert name in str(refusal(folder))


@pytest.mark.parametrize("name", ["train.documents", "val.documents"])
def test_half_or_no_documents_are_refused(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data + b"\0")
    assert name in str(refusal(folder))
    (folder / name).unlink()
    assert name in str(refusal(folder))


def put_mask(folder, bits, listed=True):
    """Give train a mask, in meta.json too where `listed`."""
    np.packbits(bits, bitorder="little").tofile(folder / "train.mask")
    if listed:
        digests = json.loads((folder / "meta.json").read_text())["sha256"]
        change_meta(folder, sha256=digests | {"train.mask": sha256_file(folder / "train.mask")})


@pytest.mark.parametrize("listed", [True, False])
def test_a_mask_is_read_and_belongs_to_the_fingerprint(folder, listed):
    plain = open_token_folder(folder)
    bits = np.arange(len(plain.train)) % 3 > 0
    put_mask(folder, bits, listed)
    data = open_token_folder(folder)
    found = np.unpackbits(data.mask, bitorder="little")[: len(bits)]
    assert np.array_equal(found, bits) and plain.mask is None
    put_mask(folder, ~bits, listed)
    assert len({plain.fingerprint, data.fingerprint, open_token_folder(folder).fingerprint}) == 3


def test_damaged_masks_are_refused(folder):
    n = len(open_token_folder(folder).train)
    for n_bits in (n - 8, n + 8, 0):
        put_mask(folder, np.ones(n_bits, bool))
        assert "train.mask" in str(refusal(folder))
    put_mask(folder, np.ones(n, bool))
    np.packbits(np.zeros(n, bool)).tofile(folder / "train.mask")
    assert "train.mask" in str(refusal(folder))
    (folder / "train.mask").unlink()
    assert "train.mask" in str(refusal(folder))


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


# The n-gram reference


def test_the_ngram_reference_is_worked_out_once_and_kept(folder, monkeypatch):
    meta = json.loads((folder / "meta.json").read_text())
    bits = meta.pop("xray")["ngram_bits_per_byte"]
    assert open_token_folder(folder).ngram_bits_per_byte == bits and 0 < bits < 3
    (folder / "meta.json").write_text(json.dumps(meta))
    before = open_token_folder(folder).fingerprint
    assert open_token_folder(folder).ngram_bits_per_byte == bits
    kept = json.loads((folder / "meta.json").read_text())
    assert kept == meta | {"xray": {"ngram_bits_per_byte": bits}}
    assert sorted(path.name for path in folder.iterdir()) == sorted([*meta["sha256"], "meta.json", "tokenizer.json"])
    monkeypatch.setattr(token_folder, "ngram_reference", None)  # not asked for again
    data = open_token_folder(folder)
    assert data.ngram_bits_per_byte == bits and data.fingerprint == before


@pytest.mark.parametrize("known", [5, "x", [], {"ngram_bits_per_byte": "x"}, {"ngram_bits_per_byte": True}, {"a": 1}])
def test_an_xray_of_no_sense_is_mended(folder, known):
    bits = open_token_folder(folder).ngram_bits_per_byte
    change_meta(folder, xray=known)
    assert open_token_folder(folder).ngram_bits_per_byte == bits
    kept = json.loads((folder / "meta.json").read_text())["xray"]
    assert kept["ngram_bits_per_byte"] == bits and kept.get("a") == (
        known.get("a") if isinstance(known, dict) else None
    )


def test_a_folder_that_cannot_be_written_to_is_left_as_it_is(folder, monkeypatch):
    bits = open_token_folder(folder).ngram_bits_per_byte
    change_meta(folder, xray={})
    before = (folder / "meta.json").read_bytes()

    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "write_synced", refuse)
    assert open_token_folder(folder).ngram_bits_per_byte == bits
    assert (folder / "meta.json").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_link_to_somebody_elses_meta_is_not_replaced(folder, tmp_path):
    change_meta(folder, xray={})
    (folder / "meta.json").rename(tmp_path / "theirs.json")
    (folder / "meta.json").symlink_to(tmp_path / "theirs.json")
    before = (tmp_path / "theirs.json").read_bytes()
    assert open_token_folder(folder).ngram_bits_per_byte > 0
    assert (folder / "meta.json").is_symlink() and (tmp_path / "theirs.json").read_bytes() == before


def test_a_nanogpt_folder_has_a_reference_where_its_ids_can_be_read(nanogpt):
    assert open_token_folder(nanogpt).ngram_bits_per_byte is None
    assert open_token_folder(nanogpt, build_tokenizer("byte")).ngram_bits_per_byte > 8
    assert sorted(path.name for path in nanogpt.iterdir()) == ["meta.pkl", "train.bin", "val.bin"]
