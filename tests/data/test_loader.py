import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnx_cli.data.loader import Loader, check_length, windows_at
from nnx_cli.data.permutation import permute
from nnx_cli.errors import DataError


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**80))
def test_permutation_is_a_bijection(n, key):
    image = permute(np.arange(n), n, key)
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permutation_of_each_place_is_independent_of_the_others():
    whole = permute(np.arange(1000), 1000, 7)
    assert np.array_equal(permute(np.array([3, 999, 3, 17]), 1000, 7), whole[[3, 999, 3, 17]])


def test_permutations_of_two_keys_differ():
    a, b = (permute(np.arange(1000), 1000, key) for key in (1, 2))
    assert (a == b).mean() < 0.02
    assert (a == np.arange(1000)).mean() < 0.02


def test_permutation_has_no_visible_order():
    image = permute(np.arange(4096), 4096, 11)
    assert abs(np.corrcoef(np.arange(4096), image)[0, 1]) < 0.06
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.06


def test_large_permutations_fit():
    image = permute(np.arange(10**12 - 1000, 10**12), 10**12, 5)
    assert len(set(image.tolist())) == 1000 and image.min() >= 0 and image.max() < 10**12


def loader(n=1000, seq_len=16, seed=3):
    return Loader(np.arange(n, dtype=np.uint16), seq_len, seed)


@pytest.mark.parametrize("n", [17, 18, 32, 33, 34, 100, 999, 1000, 1001])
def test_an_epoch_sees_every_window_once(n):
    it = loader(n)
    for epoch in range(4):
        starts = np.sort(it.starts(epoch * it.windows, it.windows))
        assert starts[0] >= 0 and starts[-1] + 16 + 1 <= n
        assert (np.diff(starts) == 16).all(), "windows of an epoch touch and do not overlap"


def test_epochs_differ_in_order_and_in_their_cuts():
    it = loader()
    epochs = [it.starts(epoch * it.windows, it.windows) for epoch in range(8)]
    assert len({tuple(starts) for starts in epochs}) == 8
    assert len({starts.min() for starts in epochs}) > 2


def test_sample_i_is_a_function_of_seed_and_i():
    it = loader()
    wanted = it.starts(0, 200)
    again = np.concatenate([loader().starts(i, 1) for i in range(200)])
    assert np.array_equal(wanted, again)
    assert np.array_equal(it.starts(150, 30), wanted[150:180]), "whatever was asked before"
    assert not np.array_equal(loader(seed=4).starts(0, 200), wanted)


@pytest.mark.parametrize("division", [[8], [2, 6], [4, 4], [1] * 8])
def test_division_into_micro_batches_does_not_matter(division):
    it = loader()
    whole = it.batch(16, 8)
    first, parts = 16, []
    for count in division:
        parts.append(it.batch(first, count))
        first += count
    assert torch.equal(torch.cat([ids for ids, _ in parts]), whole[0])
    assert torch.equal(torch.cat([targets for _, targets in parts]), whole[1])


def test_targets_follow_their_inputs():
    input_ids, targets = loader().batch(0, 5)
    assert input_ids.shape == targets.shape == (5, 16)
    assert input_ids.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, input_ids + 1), "the stream counts up"


def test_the_last_token_can_be_a_target():
    it = loader(33)
    seen = {int(t) for i in range(200) for t in it.starts(i, 1) + 16}
    assert 32 in seen


def test_windows_at():
    input_ids, targets = windows_at(np.arange(10, dtype=np.uint8), np.array([0, 5]), 4)
    assert input_ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]


def test_text_shorter_than_a_sequence_is_refused():
    loader(17)
    with pytest.raises(DataError, match="has 16 tokens; one sequence needs 17") as error:
        loader(16)
    assert error.value.fix.startswith("give more text: ")


@pytest.mark.parametrize(
    ("n_tokens", "advice"), [(20, None), (255, None), (256, "--seq-len 64"), (900, "--seq-len 225")]
)
def test_a_shorter_context_is_advised_where_it_helps(n_tokens, advice):
    with pytest.raises(DataError, match="one sequence needs 1,025") as error:
        check_length(n_tokens, 1024)
    assert (advice or "100 kB or more") in error.value.fix and ("--seq-len" in error.value.fix) == (advice is not None)


@pytest.mark.parametrize("seed", [0, 1337, 2**63 - 1])
def test_any_seed_will_do(seed):
    assert loader(seed=seed).batch(10**9, 3)[0].shape == (3, 16)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_decides_which_targets_count(dtype):
    tokens = np.random.default_rng(0).integers(0, 200, 1003).astype(dtype)
    bits = np.random.default_rng(1).random(1003) < 0.6
    mask = np.packbits(bits, bitorder="little")
    plain, masked = Loader(tokens, 16, 3), Loader(tokens, 16, 3, mask=mask, ignore_index=-7)
    for first in (0, 61):
        ids, targets = masked.batch(first, 9)
        wanted_ids, wanted = plain.batch(first, 9)
        counted = torch.from_numpy(bits[plain.starts(first, 9)[:, None] + np.arange(1, 17)])
        assert torch.equal(ids, wanted_ids) and torch.equal(targets, wanted.where(counted, -7))
    every = Loader(tokens, 16, 3, mask=np.packbits(np.ones(1003, bool), bitorder="little"))
    assert all(torch.equal(a, b) for a, b in zip(every.batch(5, 9), plain.batch(5, 9), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_mask_on_a_gpu_is_that_of_the_cpu():
    tokens = np.random.default_rng(0).integers(0, 200, 1003).astype(np.uint16)
    mask = np.packbits(np.random.default_rng(1).random(1003) < 0.6, bitorder="little")
    wanted = Loader(tokens, 16, 3, mask=mask).batch(7, 9)
    for room_bytes in (0, 10**6):
        found = Loader(tokens, 16, 3, torch.device("cuda"), room_bytes, mask).batch(7, 9)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
