import math

import pytest
import torch

from nnx_cli import models
from nnx_cli.config import SampleConfig
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.errors import UsageError
from nnx_cli.inference import sampler
from nnx_cli.inference.decoding import decoding_graph
from nnx_cli.inference.sampler import TextStream, draw, generate, next_probabilities, overlap, uniforms, window_start

NO_HISTORY = (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))


def probabilities(logits, history=None, **settings):
    """Probabilities of one row of logits under some settings (temperature 1 unless told)."""
    seen = NO_HISTORY if history is None else (torch.tensor([history]), torch.ones(1, len(history), dtype=torch.bool))
    config = SampleConfig(**({"temperature": 1.0} | settings))
    rows = next_probabilities(torch.tensor([logits]), config, *seen)
    return (rows / rows.sum()).tolist()[0]


def logs(*values):
    return [math.log(value) if value else -math.inf for value in values]


# drawing rules, by hand


def test_temperature():
    assert probabilities(logs(0.5, 0.3, 0.2)) == pytest.approx([0.5, 0.3, 0.2])
    squared = [0.25, 0.09, 0.04]
    assert probabilities(logs(0.5, 0.3, 0.2), temperature=0.5) == pytest.approx([x / 0.38 for x in squared])


@pytest.mark.parametrize("settings", [{"greedy": True}, {"temperature": 0.0}, {"greedy": True, "temperature": 5.0}])
def test_greedy_takes_the_likeliest_and_of_equals_the_first(settings):
    assert probabilities([1.0, 3.0, 2.0], **settings) == [0, 1, 0]
    assert probabilities([3.0, 1.0, 3.0], **settings) == [1, 0, 0]


@pytest.mark.parametrize(("k", "kept"), [(1, 1), (2, 2), (3, 3), (4, 4), (100, 4)])
def test_top_k(k, kept):
    values = [0.4, 0.3, 0.2, 0.1]
    total = sum(values[:kept])
    wanted = [x / total for x in values[:kept]] + [0.0] * (4 - kept)
    assert probabilities(logs(*values), top_k=k) == pytest.approx(wanted)


@pytest.mark.parametrize(("p", "kept"), [(0.1, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_holds_p(p, kept):
    values = [0.4, 0.3, 0.2, 0.1]
    total = sum(values[:kept])
    wanted = [x / total for x in values[:kept]] + [0.0] * (4 - kept)
    assert probabilities(logs(*values), top_p=p) == pytest.approx(wanted)
    assert probabilities(logs(*values[::-1]), top_p=p) == pytest.approx(wanted[::-1])


@pytest.mark.parametrize(("p", "kept"), [(0.0, 4), (0.2, 4), (0.3, 3), (0.6, 2), (0.8, 1), (1.0, 1)])
def test_min_p_drops_what_is_less_likely_than_a_part_of_the_likeliest(p, kept):
    values = [0.4, 0.3, 0.2, 0.1]
    total = sum(values[:kept])
    wanted = [x / total for x in values[:kept]] + [0.0] * (4 - kept)
    assert probabilities(logs(*values), min_p=p) == pytest.approx(wanted)


def test_rules_act_one_after_the_other():
    """Top-k 3 leaves 4:3:2 of nine; top-p 0.7 of that two; min-p 0.8 of the likeliest one."""
    values = logs(0.4, 0.3, 0.2, 0.1)
    assert probabilities(values, top_k=3, top_p=0.7) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert probabilities(values, top_k=3, top_p=0.7, min_p=0.8) == [1, 0, 0, 0]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = [2.0, 2.0, -1.0, -1.0]
    wanted = torch.tensor([1.0, 2.0, -2.0, -1.0]).softmax(0).tolist()
    assert probabilities(logits, history=[0, 2, 2, 0, 0], repetition_penalty=2.0) == pytest.approx(wanted)
    assert probabilities(logits, history=[], repetition_penalty=2.0) == pytest.approx(
        torch.tensor(logits).softmax(0).tolist()
    )


def test_padding_of_a_shorter_row_is_no_history():
    history = torch.tensor([[1, 2, 0, 0], [1, 2, 3, 0]])
    seen = torch.tensor([[True, True, False, False], [True] * 4])
    rows = next_probabilities(torch.ones(2, 5), SampleConfig(temperature=1.0, repetition_penalty=2.0), history, seen)
    assert (rows[0] == rows[0].max()).tolist() == [True, False, False, True, True]
    assert (rows[1] == rows[1].max()).tolist() == [False, False, False, False, True]


def test_draw_inverts_the_cumulated_probabilities():
    rows = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for uniform, wanted in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (0.999999, 4)]:
        assert draw(rows, torch.tensor([uniform])).item() == wanted, uniform
    assert draw(rows * 0.1, torch.tensor([0.5])).item() == 3, "the sum need not be one"


def test_draw_never_takes_what_has_no_probability():
    rows = torch.rand(2000, 300).masked_fill(torch.rand(2000, 300) < 0.7, 0.0)
    rows[:, 0] = rows[:, -1] = 0.0
    for uniform in (torch.rand(2000), torch.zeros(2000), torch.full((2000,), 1.0 - 2**-24)):
        chosen = draw(rows, uniform)
        assert (rows.gather(1, chosen[:, None]) > 0).all()


def test_draw_follows_the_probabilities():
    rows = torch.tensor([[0.1, 0.6, 0.3]]).expand(30_000, 3)
    counts = torch.bincount(draw(rows, torch.rand(30_000, generator=torch.Generator().manual_seed(0))), minlength=3)
    assert (counts / 30_000).tolist() == pytest.approx([0.1, 0.6, 0.3], abs=0.01)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"num_samples": 0},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(UsageError, match="--" + next(iter(bad)).replace("_", "-")):
        SampleConfig(**bad)


# generation


def run(model, prompts, *, tokenizer=None, **settings):
    options = {key: settings.pop(key) for key in ("stops", "use_cache", "on_text") if key in settings}
    return generate(model, tokenizer, prompts, SampleConfig(**settings), **options)


def test_row_numbers_do_not_depend_on_the_number_of_rows():
    config = SampleConfig(max_new_tokens=20, seed=7)
    many = uniforms(config, 5)
    assert torch.equal(uniforms(config, 2), many[:2])
    assert len({tuple(row.tolist()) for row in many}) == 5
    assert torch.equal(uniforms(SampleConfig(max_new_tokens=10, seed=7), 5), many[:, :10])


@pytest.mark.parametrize("name", ["llama", "nyx"])
def test_sample_j_does_not_depend_on_the_number_of_samples(tiny, name):
    model = tiny(name)
    many = [sample.tokens for sample in run(model, [[1, 2, 3]], num_samples=4, max_new_tokens=40).samples]
    assert len({tuple(tokens) for tokens in many}) == 4
    for n in (1, 2, 3):
        few = [sample.tokens for sample in run(model, [[1, 2, 3]], num_samples=n, max_new_tokens=40).samples]
        assert few == many[:n]


def test_same_seed_same_text_another_seed_another(tiny):
    model = tiny()
    one, same, other = (run(model, [[5]], seed=seed).samples[0].tokens for seed in (3, 3, 4))
    assert one == same != other


PROMPTS = [[1], list(range(2, 14)), [60, 3, 60], list(range(31)), list(range(40, 9, -1)) + [7] * 5]


def sharp(model):
    """The model with weights that make its logits depend on the whole context."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return model


@pytest.mark.parametrize("name", ["llama", "nyx"])
def test_five_prompts_in_a_batch_cached_and_not(tiny, name):
    """Rows of different length, past the end of the context several times: every way gives the same tokens."""
    model = sharp(tiny(name))
    settings = dict(max_new_tokens=3 * model.config.seq_len, seed=1, repetition_penalty=1.1)
    cached = [sample.tokens for sample in run(model, PROMPTS, **settings).samples]
    uncached = [sample.tokens for sample in run(model, PROMPTS, use_cache=False, **settings).samples]
    assert cached == uncached
    assert all(len(tokens) == 3 * model.config.seq_len for tokens in cached)
    greedy = dict(max_new_tokens=50, greedy=True)
    together = [sample.tokens for sample in run(model, PROMPTS, **greedy).samples]
    alone = [run(model, [prompt], **greedy).samples[0].tokens for prompt in PROMPTS]
    assert together == alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA card")
@pytest.mark.parametrize("name", models.names())
def test_recorded_decoding_draws_what_plain_decoding_draws(tiny, name, monkeypatch):
    """Past the end of the context several times, so that caches are read anew under the same graph."""
    model = sharp(tiny(name)).to("cuda")
    settings = dict(max_new_tokens=3 * model.config.seq_len, seed=1)
    made = []
    monkeypatch.setattr(sampler, "decoding_graph", lambda *args: made.append(decoding_graph(*args)) or made[-1])
    recorded = [sample.tokens for sample in run(model, PROMPTS, **settings).samples]
    assert len(made) == 1
    model.syncs_in_eval = True  # so that nothing is recorded
    assert [sample.tokens for sample in run(model, PROMPTS, **settings).samples] == recorded and len(made) == 1


def test_samples_of_several_prompts_come_prompt_after_prompt(tiny):
    model = tiny()
    result = run(model, [[1, 2], [9, 8, 7]], num_samples=2, greedy=True, max_new_tokens=12)
    tokens = [sample.tokens for sample in result.samples]
    assert tokens[0] == tokens[1] and tokens[2] == tokens[3]
    assert tokens[0] == run(model, [[1, 2]], greedy=True, max_new_tokens=12).samples[0].tokens
    assert tokens[2] == run(model, [[9, 8, 7]], greedy=True, max_new_tokens=12).samples[0].tokens
    assert result.prefill_tokens == 5 and result.decode_tokens == 48


def test_greedy_is_the_argmax_of_the_full_pass(tiny):
    model = sharp(tiny("llama")).eval()
    tokens = [4, 9]
    for token in run(model, [tokens], greedy=True, max_new_tokens=20).samples[0].tokens:
        assert token == model(torch.tensor([tokens]))[0, -1].argmax().item()
        tokens = [*tokens, token]


def test_of_a_long_prompt_the_model_sees_the_end(tiny):
    model = sharp(tiny())
    long = [(7 * i) % 64 for i in range(100)]
    start = window_start(100, 32)
    whole = run(model, [long], greedy=True, max_new_tokens=4).samples[0].tokens
    assert whole == run(model, [long[start:]], greedy=True, max_new_tokens=4).samples[0].tokens
    assert run(model, [long], max_new_tokens=1).prefill_tokens <= 32


def test_window_slides_by_half_a_context():
    assert [window_start(n, 32) for n in (1, 31, 32, 33, 48, 49, 64, 65)] == [0, 0, 0, 16, 16, 32, 32, 48]
    for seq_len in (1, 2, 3, 7, 32):
        for length in range(1, 200):
            assert 1 <= length - window_start(length, seq_len) <= seq_len


def test_a_context_of_one_token_works(tiny):
    assert len(run(tiny(seq_len=1), [[1, 2, 3]], max_new_tokens=10).samples[0].tokens) == 10


def test_training_mode_is_as_before(tiny):
    for training in (True, False):
        model = tiny(dropout=0.5).train(training)
        first = run(model, [[1]], max_new_tokens=5).samples[0].tokens
        assert model.training is training
        assert run(model, [[1]], max_new_tokens=5).samples[0].tokens == first, "dropout is off"


# text


class Script(torch.nn.Module):
    """A model that says what it is told, token by token."""

    def __init__(self, model, tokens):
        super().__init__()
        self.config, self.tokens, self.device, self.said = model.config, tokens, torch.device("cpu"), 0

    def trunk(self, input_ids, cache=None):
        return torch.zeros(*input_ids.shape, 1)

    def head(self, x):
        logits = torch.zeros(*x.shape[:-1], self.config.vocab_size)
        logits[..., self.tokens[self.said]] = 99.0
        self.said += 1
        return logits


class WithEnd(ByteTokenizer):
    def __init__(self):
        super().__init__()
        self.eot_id = 0


def say(tiny, text, tokenizer=None, **options):
    data = text if isinstance(text, bytes) else text.encode()
    pieces = []
    result = run(
        Script(tiny(vocab_size=256), list(data)),
        [[10]],
        tokenizer=tokenizer or ByteTokenizer(),
        use_cache=False,
        max_new_tokens=len(data),
        on_text=lambda sample, piece: pieces.append(piece),
        **options,
    )
    (sample,) = result.samples
    assert "".join(pieces) == sample.text
    return sample, pieces


def test_whole_characters_are_streamed(tiny):
    text = "naïve 小猫 🙂!"
    sample, pieces = say(tiny, text)
    assert sample.text == text and sample.stop_reason == "length"
    assert pieces == list(text)


def test_half_a_character_at_the_end_is_left_out(tiny):
    sample, pieces = say(tiny, "a🙂".encode()[:-1])
    assert sample.text == "a" and pieces == ["a"]


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one two END three", ["END"], "one two "),
        ("one EN two END", ["END"], "one EN two "),
        ("one ENEND two", ["END"], "one EN"),
        ("aaab", ["aab"], "a"),
        ("one. two; three", [";", "."], "one"),
        ("ab小猫cd", ["小猫"], "ab"),
        ("END", ["END"], ""),
        ("xaby", ["abz", "b"], "xa"),
        ("xabcd", ["bcd", "abcde"], "xa"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(tiny, text, stops, wanted):
    sample, pieces = say(tiny, text, stops=stops)
    assert sample.text == wanted and sample.stop_reason == "stop"
    assert not any(stop in "".join(pieces) for stop in stops)


def test_the_beginning_of_a_stop_string_is_text_after_all(tiny):
    sample, _ = say(tiny, "one EN", stops=["END"])
    assert sample.text == "one EN" and sample.stop_reason == "length"


def test_an_empty_stop_string_stops_nothing(tiny):
    sample, _ = say(tiny, "one", stops=[""])
    assert sample.text == "one" and sample.stop_reason == "length"


def test_the_end_of_text_token_ends_a_sample(tiny):
    sample, _ = say(tiny, b"one\0two", tokenizer=WithEnd())
    assert sample.text == "one" and sample.stop_reason == "eot" and sample.tokens == list(b"one")


def test_what_was_held_back_is_let_go_at_the_end_of_text(tiny):
    sample, _ = say(tiny, b"one EN\0", tokenizer=WithEnd(), stops=["END"])
    assert sample.text == "one EN" and sample.stop_reason == "eot"


def test_nothing_is_drawn_once_all_samples_have_ended(tiny):
    model = Script(tiny(vocab_size=256), list(b"ab;" + bytes(97)))
    run(model, [[10]], tokenizer=ByteTokenizer(), use_cache=False, max_new_tokens=100, stops=[";"])
    assert model.said == 3


def test_without_a_tokenizer_text_is_ids(tiny):
    (sample,) = run(tiny(), [[1]], max_new_tokens=3).samples
    assert sample.text.split() == [str(token) for token in sample.tokens]


def test_tokens_after_the_end_change_nothing():
    stream = TextStream(ByteTokenizer(), ["b"], lambda piece: None)
    for token in b"ab":
        stream.push(token)
    stream.finish("length")
    assert (stream.text, stream.stop_reason) == ("a", "stop")


def test_overlap():
    assert [overlap("abc", stop) for stop in ("cd", "bcd", "abc", "xyz", "c")] == [1, 2, 0, 0, 0]
