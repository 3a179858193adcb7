"""Steps of decoding, whichever way they run: the tokens are those of the plain full pass."""

from pathlib import Path

import pytest
import torch

from nnx_cli import models
from nnx_cli.config import SampleConfig
from nnx_cli.convert.quantize import quantized_state
from nnx_cli.inference import decoding
from nnx_cli.inference.decoding import Decoder, Window, span, window_start
from nnx_cli.inference.sampler import Rules
from nnx_cli.kernels.next_token import next_probabilities
from nnx_cli.layers import quantized
from nnx_cli.layers.quantized import Quantization, QuantizedLinear, quantize_layers, widen
from nnx_cli.runs.load import fill_model

SEQ_LEN = 16
N_TOKENS = 36  # some times past the context
MANY = 160
PROMPTS = [[1], list(range(2, 8)), [60, 3, 60], list(range(15)), list(range(40, 25, -1)) + [7] * 3]
TIE = 1e-4  # of logits, or of probability between a draw and the next token: what rounding may decide
ROUNDING = 0.05  # of the largest logit: what activations in 8 bits or bfloat16 may decide
WAYS = ("cache", "no cache", "spans")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture
def model(request, tiny):
    """A model with weights that make its logits depend on the whole context."""
    model = tiny(request.param, seq_len=SEQ_LEN).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return model


every_model = pytest.mark.parametrize("model", models.names(), indirect=True)


def decoder(model, prompts, way="cache", **settings):
    """A decoder; with spans it does on a CPU what would be captured."""
    made = Decoder(model, prompts, SampleConfig(**settings), use_cache=way != "no cache")
    if way == "spans":
        made.has_spans = True
    return made


@torch.inference_mode()
def draw(model, prompts, n=N_TOKENS, way="cache", **settings):
    """The tokens of every sequence."""
    drawn = decoder(model, prompts, way, **({"max_new_tokens": n} | settings)).tokens(n)
    return [list(sequence) for sequence in zip(*drawn, strict=True)]


@torch.inference_mode()
def full_pass(model, tokens):
    """Logits (V,) after the last token, from a pass over all that the model sees."""
    seen = tokens[window_start(len(tokens), model.config.seq_len) :]
    return model(torch.tensor([seen], device=model.device))[0, -1].float().cpu()


@torch.inference_mode()
def check_greedy(model, prompt, tokens, tie=TIE):
    """Each token is the likeliest of the full pass over what the model sees before it, but for ties."""
    known, length = [*prompt, *tokens], len(prompt)
    while length < len(known):
        start = window_start(length, model.config.seq_len)
        end = min(start + model.config.seq_len, len(known) - 1)  # as far as the model sees from `start` on
        logits = model(torch.tensor([known[start:end]], device=model.device))[0, length - 1 - start :].float().cpu()
        chosen = logits.gather(1, torch.tensor(known[length : end + 1])[:, None])[:, 0]
        scale = logits.abs().amax(1).clamp(min=1.0)
        assert ((logits.amax(1) - chosen) < tie * scale).all(), (start, end)
        length = end + 1


@every_model
@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_the_full_pass(model, way, monkeypatch):
    """Five prompts side by side, of different length, far past the context."""
    monkeypatch.setattr(decoding, "SPAN", 8)
    monkeypatch.setattr(decoding, "ALIGNED", 4)
    monkeypatch.setattr(decoding, "GRAPH_FROM", 2)
    for prompt, tokens in zip(PROMPTS, draw(model, PROMPTS, MANY, way=way, greedy=True), strict=True):
        assert len(tokens) == MANY
        check_greedy(model, prompt, tokens)


@every_model
@pytest.mark.parametrize("bits, group_size", [(8, None), (4, 32)], ids=["int8", "int4"])
def test_quantized_greedy_tokens_are_those_of_the_full_pass(model, bits, group_size, monkeypatch):
    """With the matmuls that large matrices have, by weights that are the same in both."""
    monkeypatch.setattr(quantized, "SMALL_MATRIX", 0)
    how = Quantization(bits=bits, group_size=group_size, kept=[])
    state = widen(quantized_state(model, how))
    quantize_layers(model, how)
    model = fill_model(model, state, Path(), torch.device("cpu"), "fp32")
    tie = ROUNDING if any(isinstance(layer, QuantizedLinear) for layer in model.modules()) else TIE
    for prompt, tokens in zip(PROMPTS[:3], draw(model, PROMPTS[:3], MANY, greedy=True), strict=True):
        check_greedy(model, prompt, tokens, tie)


@every_model
def test_all_ways_draw_the_same(model):
    settings = dict(n=24, num_samples=2, seed=1, repetition_penalty=1.1, top_k=20, top_p=0.95, min_p=0.01)
    wanted, *others = (draw(model, PROMPTS, way=way, **settings) for way in WAYS)
    assert len(wanted) == 2 * len(PROMPTS) and len({tuple(tokens) for tokens in wanted}) == len(wanted)
    assert all(found == wanted for found in others)


def alone(model, row, seed, n, **settings):
    """The tokens of sequence `row`, drawn by itself with the numbers that it has among others."""
    one = decoder(model, [[1, 2, 3]], max_new_tokens=n, seed=seed, **settings)
    one.uniforms.generators[0].manual_seed(seed * 1_000_003 + row)
    return [token for (token,) in one.tokens(n)]


def distance_to_boundary(model, known, row, seed, n_drawn, **settings):
    """How far the number that decides the next token lies from where the token would be another, as a probability."""
    rules = Rules(SampleConfig(**settings), model.config.vocab_size, torch.device("cpu"))
    nothing = torch.ones(1, 0, dtype=torch.bool)
    rows = next_probabilities(full_pass(model, known)[None], rules.stages, rules.numbers, nothing)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
    number = torch.rand(n_drawn + 1, generator=generator)[-1]
    cumulated = rows[0].cumsum(0)
    return (cumulated / cumulated[-1] - number).abs().min()


@every_model
@pytest.mark.parametrize("way, n", [("cache", MANY), ("spans", N_TOKENS)])
@torch.inference_mode()
def test_a_sequence_is_the_same_alone_and_among_others(model, way, n):
    """In float32 all but one at most; and where one leaves, rounding decided. (bench/decode.py looks at all 32.)"""
    settings, seed = dict(temperature=0.8, top_k=50), 11
    together = draw(model, [[1, 2, 3]], n, way=way, num_samples=32, seed=seed, **settings)
    rows = (0, 5, 10, 16, 21, 26, 31) if n == MANY else (0, 31)
    left = 0
    for row in rows:
        found = alone(model, row, seed, n, **settings)
        if found == together[row]:
            continue
        left += 1
        at = next(i for i, pair in enumerate(zip(found, together[row], strict=True)) if pair[0] != pair[1])
        assert distance_to_boundary(model, [1, 2, 3, *found[:at]], row, seed, at, **settings) < TIE
    assert left <= 1


@every_model
@torch.inference_mode()
def test_the_window_is_read_once_per_half_context(model, monkeypatch):
    """By each of the sequences, and every other pass is of the newest tokens."""
    passes = []
    trunk = model.trunk

    def counted(ids, cache=None):
        passes.append(tuple(ids.shape))
        return trunk(ids, cache)

    monkeypatch.setattr(model, "trunk", counted)
    draw(model, PROMPTS, greedy=True)
    n_rows = len(PROMPTS)
    assert passes.count((n_rows, 1)) == N_TOKENS
    read = [shape for shape in passes if shape[1] > 1]
    read_in = [range(len(prompt), len(prompt) + N_TOKENS) for prompt in PROMPTS]  # lengths that are read
    slides = [len({window_start(length, SEQ_LEN) for length in lengths}) - 1 for lengths in read_in]
    assert read[0][0] == n_rows and sum(shape[0] for shape in read[1:]) == sum(slides)
    assert max(slides) <= -(-N_TOKENS // (SEQ_LEN // 2)) and all(shape[1] == SEQ_LEN // 2 for shape in read[1:])


def test_a_cache_that_takes_no_rows_is_read_anew(tiny, monkeypatch):
    """As an architecture of somebody's own may have it."""
    model = tiny("llama")
    wanted = draw(model, PROMPTS, n=80, greedy=True)
    monkeypatch.delattr(type(model.make_cache(1, 1)), "put")
    assert draw(model, PROMPTS, n=80, greedy=True) == wanted


@pytest.mark.parametrize("seq_len", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_short_contexts(tiny, seq_len, way):
    model = tiny("llama", seq_len=seq_len)
    for prompt, tokens in zip([[1], [5, 6, 7]], draw(model, [[1], [5, 6, 7]], n=20, way=way, greedy=True), strict=True):
        check_greedy(model, prompt, tokens)


@torch.inference_mode()
def test_memory_does_not_grow_with_the_tokens_asked_for(tiny):
    """Ten million of them: nothing is laid out beforehand, and what is kept stays as large as it is."""
    made = decoder(tiny("llama"), PROMPTS, max_new_tokens=10**7, num_samples=4, repetition_penalty=1.1)

    def n_bytes():
        return sum(x.nbytes for x in made.state) + made.cache.n_bytes

    before = n_bytes()
    assert before < 2**21
    tokens = made.tokens(10**7)
    for _ in range(600):
        next(tokens)
    assert n_bytes() == before


def test_window_slides_by_half_a_context():
    assert [window_start(n, 32) for n in (1, 31, 32, 33, 48, 49, 64, 65)] == [0, 0, 0, 16, 16, 32, 32, 48]
    for seq_len in (1, 2, 3, 7, 32):
        for length in range(1, 200):
            assert 1 <= length - window_start(length, seq_len) <= seq_len


def test_the_window_holds_what_the_model_sees():
    sequences = [list(range(n)) for n in (1, 4, 9, 23)]
    window = Window(sequences, 8, torch.device("cpu"))
    for step in range(100, 140):
        window.slide()
        for row, sequence in enumerate(sequences):
            seen = sequence[window_start(len(sequence), 8) :]
            assert window.counts()[row] == window.lengths[row] == len(seen)
            assert window.tokens[row, : len(seen)].tolist() == seen
        assert window.longest == max(window.counts())
        assert window.newest().flatten().tolist() == [sequence[-1] for sequence in sequences]
        window.tokens.scatter_(1, window.lengths[:, None], torch.full((4, 1), step))
        window.lengths += 1
        window.note_append()
        sequences = [[*sequence, step] for sequence in sequences]


def test_spans_are_few_and_have_room():
    for capacity in (20, 256, 300, 517, 576, 1024, 8192):
        spans = [span(length, capacity) for length in range(1, capacity + 1)]
        assert all(length <= covered <= capacity for length, covered in enumerate(spans, 1))
        assert spans == sorted(spans) and len(set(spans)) <= 1 + (capacity // 256).bit_length()
        assert all(covered < 2 * max(length + 32, 256) for length, covered in enumerate(spans, 1))


@needs_gpu
@every_model
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_captured_steps_draw_what_plain_ones_draw(model, precision):
    model = model.to("cuda")
    model.compute_dtype = precision
    with torch.inference_mode():
        captured, plain = (decoder(model, PROMPTS, max_new_tokens=100, greedy=True) for _ in range(2))
        plain.captures = False
        found, wanted = ([list(tokens) for tokens in made.tokens(100)] for made in (captured, plain))
        assert found == wanted
        recorded = captured.graphs.recorded
        assert all(recorded.values()) and len(recorded) == (not model.syncs_in_eval)


@needs_gpu
@every_model
@torch.inference_mode()
def test_captured_greedy_tokens_are_those_of_the_full_pass(model):
    model = model.to("cuda")
    for prompt, tokens in zip(PROMPTS, draw(model, PROMPTS, greedy=True), strict=True):
        check_greedy(model, prompt, tokens)


@needs_gpu
@torch.inference_mode()
def test_other_numbers_capture_nothing_anew(tiny):
    model = tiny("llama").to("cuda")
    made = decoder(model, [[1, 2, 3]], max_new_tokens=200, top_k=9, num_samples=3)
    for _ in range(20):
        made.step()
    assert len(made.graphs.recorded) == 1
    made.rules.set(SampleConfig(temperature=1e-3, top_k=12))  # as good as greedy
    tokens = [made.step().flatten().tolist() for _ in range(20)]
    assert len(made.graphs.recorded) == 1 and all(len(set(step)) >= 1 for step in tokens)
    known = made.window.tokens[0, : made.window.counts()[0]].tolist()
    assert full_pass(model, known[:-1]).argmax() == known[-1]
    made.rules.set(SampleConfig(greedy=True))
    made.step()
    assert len(made.graphs.recorded) == 2


def test_rules_that_need_no_numbers_draw_none(tiny):
    with torch.inference_mode():
        made = decoder(tiny("nyx"), [[1]], max_new_tokens=5, greedy=True)
        state = made.uniforms.generators[0].get_state()
        list(made.tokens(5))
        assert torch.equal(made.uniforms.generators[0].get_state(), state)
