"""Rows that are decoded together write what each writes alone."""

import dataclasses

import pytest
import torch

from nnx_cli import models
from nnx_cli.config import SampleConfig
from nnx_cli.inference.batch import Batch, Row
from nnx_cli.inference.generate import generate

GREEDY = SampleConfig(greedy=True)
WAYS = [
    GREEDY,
    SampleConfig(temperature=1.0, seed=3),
    SampleConfig(temperature=0.7, top_k=5, seed=4),
    SampleConfig(temperature=1.2, top_k=7, top_p=0.9, seed=5),
    SampleConfig(min_p=0.02, repetition_penalty=1.3, seed=6),
    SampleConfig(greedy=True, repetition_penalty=1.5),
    SampleConfig(temperature=0.0),
]


def alone(model, prompt, config, n, number=0):
    """What `nnx sample` draws: the tokens of a sample."""
    config = dataclasses.replace(config, max_new_tokens=n, num_samples=number + 1)
    return generate(model, None, [prompt], config).samples[number].tokens


def prompts(n, vocab_size=64):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (1 + 5 * k % 23,), generator=draw).tolist() for k in range(n)]


def run(batch, rows, n):
    """Steps until every row has `n` tokens; returns what each drew. A row leaves when it has them."""
    drawn = {id(row): [] for row in rows}
    while batch.rows:
        for row, token in batch.step():
            drawn[id(row)].append(token)
            if len(drawn[id(row)]) == n:
                batch.remove(row)
    return [drawn[id(row)] for row in rows]


@pytest.fixture(params=[False, True], ids=["", "spans"])
def batch_of(request):
    """Makes a batch; with spans it does on a CPU what is captured on a GPU."""

    def make(model, most):
        batch = Batch(model, most)
        if request.param and model.syncs_in_eval:
            pytest.skip("it is never captured")
        batch.has_spans |= request.param
        return batch

    return make


@pytest.mark.parametrize("name", models.names())
def test_every_architecture_writes_the_same_together_as_alone(tiny, name, batch_of):
    model = tiny(name, seq_len=16).eval()
    rows = [Row(prompt, GREEDY) for prompt in prompts(5)]
    batch = batch_of(model, 8)
    batch.add(rows)
    together = run(batch, rows, 20)  # beyond the context
    assert together == [alone(model, row.ids[:-20], GREEDY, 20) for row in rows]
    assert batch.rows == []


def test_every_way_to_draw_is_the_same_beside_all_others(tiny):
    model = tiny("llama").eval()
    rows = [Row(prompt, way) for prompt, way in zip(prompts(len(WAYS)), WAYS, strict=True)]
    batch = Batch(model, 8)
    batch.add(rows)
    assert run(batch, rows, 30) == [alone(model, row.ids[:-30], row.config, 30) for row in rows]


def test_samples_of_one_seed_are_numbered(tiny):
    model, way = tiny("nyx").eval(), SampleConfig(temperature=1.0, seed=9)
    rows = [Row([1, 2, 3], way, number) for number in range(3)]
    batch = Batch(model, 4)
    batch.add(rows)
    found = run(batch, rows, 20)
    assert found == [alone(model, [1, 2, 3], way, 20, number) for number in range(3)]
    assert len({tuple(tokens) for tokens in found}) == 3


@pytest.mark.parametrize(
    ("name", "batch_of"),
    [("llama", False), ("n4", False), ("n4", True)],
    indirect=["batch_of"],
)
def test_rows_come_and_go_while_others_go_on(tiny, name, batch_of):
    """Some join late, some leave early; slots are used again, and but for spans grow and fall in number."""
    model = tiny(name).eval()
    batch, sizes = batch_of(model, 16), set()
    waiting = [Row(prompt, GREEDY) for prompt in prompts(30)]
    lengths = {id(row): 3 + 7 * n % 41 for n, row in enumerate(waiting)}
    done = []
    for step in range(2000):
        joining = [waiting.pop() for _ in range(min(len(waiting), 16 - len(batch.rows), 1 + step % 3))]
        if joining:
            batch.add(joining)
        for row, _ in batch.step():
            lengths[id(row)] -= 1
            if lengths[id(row)] == 0:
                batch.remove(row)
                done.append(row)
        sizes.add(len(batch.slots))
        if not waiting and not batch.rows:
            break
    assert len(done) == 30 and (sizes == {16} if batch.has_spans else sizes >= {1, 4, 16})
    for row in done[::3]:
        n = next(k for k in range(1, len(row.ids)) if prompts(30).count(row.ids[:-k]))
        assert row.ids[-n:] == alone(model, row.ids[:-n], GREEDY, n)


def test_a_cache_that_knows_no_rows_is_read_anew(tiny, monkeypatch, batch_of):
    from nnx_cli.layers.kv_cache import KVCache

    model = tiny("llama").eval()
    want = [alone(model, prompt, GREEDY, 12) for prompt in prompts(3)]
    monkeypatch.delattr(KVCache, "put")
    monkeypatch.delattr(KVCache, "take")
    batch, rows = batch_of(model, 4), [Row(prompt, GREEDY) for prompt in prompts(3)]
    batch.add(rows[:1])
    first = [token for _ in range(4) for _, token in batch.step()]
    batch.add(rows[1:])
    drawn = run(batch, rows, 12 - 4)
    assert first + drawn[0] == want[0] and [tokens[:8] for tokens in drawn[1:]] == [tokens[:8] for tokens in want[1:]]


def test_logprobs_are_those_of_the_model(tiny):
    model = tiny("nyx").eval()
    row = Row([5, 6, 7], SampleConfig(temperature=0.5, top_k=3, seed=1), n_likeliest=4)
    batch = Batch(model, 2)
    batch.add([row])
    tokens = run(batch, [row], 6)[0]
    with torch.no_grad():
        logprobs = model(torch.tensor([row.ids[:-1]])).log_softmax(2)[0, 2:]
    assert row.logprobs == pytest.approx(
        [float(line[token]) for line, token in zip(logprobs, tokens, strict=True)], abs=1e-5
    )
    for line, likeliest in zip(logprobs, row.likeliest, strict=True):
        best = line.topk(4)
        assert [token for token, _ in likeliest] == best.indices.tolist()
        assert [value for _, value in likeliest] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert Row([1], GREEDY).likeliest == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", models.names())
def test_captured_passes_draw_what_plain_ones_draw(tiny, name):
    model = tiny(name).eval().to("cuda")
    found = []
    for captures in (True, False):
        batch, rows = Batch(model, 8), [Row(prompt, GREEDY) for prompt in prompts(5)]
        batch.captures &= captures
        batch.add(rows[:2])
        first = [token for _ in range(6) for _, token in batch.step()]
        batch.add(rows[2:])
        found.append((first, run(batch, rows, 40)))
        assert len(batch.graphs.recorded) == (captures and not model.syncs_in_eval)
    assert found[0] == found[1]


def test_where_memory_lacks_for_all_rows_there_are_as_few_as_needed(tiny, monkeypatch):
    model = tiny("llama").eval()
    make_cache = model.make_cache

    def scarce(batch_size, max_seq_len):
        if batch_size == 16:
            raise torch.OutOfMemoryError("no room")
        return make_cache(batch_size, max_seq_len)

    monkeypatch.setattr(model, "make_cache", scarce)
    batch, rows = Batch(model, 16), [Row(prompt, GREEDY) for prompt in prompts(3)]
    batch.has_spans = True
    batch.add(rows)
    assert run(batch, rows, 5) == [alone(model, row.ids[:-5], GREEDY, 5) for row in rows]
    assert len(batch.slots) <= 4 and not batch.has_spans
