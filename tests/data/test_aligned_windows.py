import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnx_cli.data.aligned_windows import AlignedWindows, Lap, with_separators
from nnx_cli.data.loader import Loader

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def documents_of(lengths):
    return np.concatenate(([0], np.cumsum(lengths)[:-1])).astype("<u8"), int(np.sum(lengths))


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 3))
def test_windows_begin_at_documents_or_go_on_with_long_ones(lengths, seq_len, seed, epoch):
    documents, n = documents_of([*lengths, seq_len + 1])
    windows = AlignedWindows(documents, n, seq_len, seed)
    begins, _ = with_separators(documents, n)
    places = windows.places(epoch * windows.n, windows.n)
    assert places.shape == (windows.n, seq_len + 1) and places.min() >= 0 and places.max() < n
    for start in places[:, 0].tolist():
        own = begins[np.searchsorted(begins, start, side="right") - 1]
        assert (start - own) % seq_len == 0, "a document is cut where windows inside of it end"
    for row in places:
        jumps = np.flatnonzero(np.diff(row) != 1)
        assert all(row[j + 1] in begins and (row[j] + 1 in begins or row[j] + 1 == n) for j in jumps)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), seed=st.integers(0, 2**63 - 1))
def test_the_first_epoch_has_every_token_as_a_target(lengths, seq_len, seed):
    documents, n = documents_of([*lengths, seq_len + 1])
    windows = AlignedWindows(documents, n, seq_len, seed)
    targets = set(windows.places(0, windows.n)[:, 1:].ravel().tolist())
    assert targets >= set(range(n)) - set(with_separators(documents, n)[0].tolist()), "but what documents begin with"
    assert len(set(range(n)) - targets) <= 1 + windows.n


def test_later_epochs_leave_out_little():
    documents, n = documents_of(np.random.default_rng(0).integers(5, 60, 500))
    windows = AlignedWindows(documents, n, 64, 3)
    for epoch in range(1, 6):
        seen = np.unique(windows.places(epoch * windows.n, windows.n))
        assert len(seen) > 0.97 * n


def test_a_document_is_read_from_its_beginning_unless_it_is_long():
    """Lengths 10, 50, 3, 4 in windows of 8, in their own order: by hand."""
    begins, lengths = np.array([0, 10, 60, 63]), np.array([10, 50, 3, 4])
    lap = Lap(begins, lengths, 8)
    assert lap.starts.tolist() == [0, 8, 10, 18, 26, 34, 42, 50, 58, 63]
    assert lap.places(np.array([9]), 9).tolist() == [[63, 64, 65, 66, 0, 1, 2, 3, 4]], "behind the last, the first"


def test_sample_i_is_a_function_of_seed_and_i():
    documents, n = documents_of(np.random.default_rng(1).integers(3, 40, 90))
    windows = AlignedWindows(documents, n, 16, 5)
    wanted = windows.places(0, 3 * windows.n)
    again = AlignedWindows(documents, n, 16, 5)
    late = again.places(2 * windows.n - 3, 9)
    assert np.array_equal(late, wanted[2 * windows.n - 3 : 2 * windows.n + 6]), (
        "across epochs, whatever was asked before"
    )
    assert np.array_equal(again.places(4, 1), wanted[4:5])
    assert not np.array_equal(AlignedWindows(documents, n, 16, 6).places(0, 50), wanted[:50])
    epochs = wanted.reshape(3, windows.n, -1)
    assert not np.array_equal(np.sort(epochs[0][:, 0]), np.sort(epochs[1][:, 0])), "documents meet others every time"


def test_documents_keep_the_separator_before_them():
    begins, lengths = with_separators(np.array([0, 1, 5, 9], "<u8"), 12)
    assert begins.tolist() == [0, 4, 8] and lengths.tolist() == [4, 4, 4], "a document of one token goes with the next"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("room_bytes", [0, 10**6])
def test_a_loader_of_documents(device, room_bytes):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tokens = np.arange(1000, dtype=np.uint16)
    documents = np.array([0, *range(7, 1000, 31)], "<u8")
    bits = np.random.default_rng(1).random(1000) < 0.6
    mask = np.packbits(bits, bitorder="little")
    loader = Loader(tokens, 24, 3, torch.device(device), room_bytes, mask, -7, documents)
    ids, targets = (x.cpu() for x in loader.batch(17, 40))
    places = AlignedWindows(documents, 1000, 24, 3).places(17, 40)
    assert torch.equal(ids, torch.from_numpy(places[:, :-1]))
    wanted = torch.from_numpy(places[:, 1:])
    assert torch.equal(targets, wanted.where(torch.from_numpy(bits[places[:, 1:]]), -7))
