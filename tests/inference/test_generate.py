import pytest
import torch

from nnx_cli import models
from nnx_cli.config import SampleConfig
from nnx_cli.convert.quantize import quantized_state
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.inference.decoding import window_start
from nnx_cli.inference.generate import generate, useful_threads
from nnx_cli.kernels import quantized_matmul
from nnx_cli.layers import quantized
from nnx_cli.layers.linear import Linear
from nnx_cli.layers.quantized import Quantization, QuantizedLinear, dequantize_layers, quantize_layers, widen
from nnx_cli.runs.load import fill_model

INT8 = Quantization(bits=8, group_size=None, kept=[])


def run(model, prompts, *, tokenizer=None, **settings):
    options = {key: settings.pop(key) for key in ("stops", "use_cache", "on_text") if key in settings}
    return generate(model, tokenizer, prompts, SampleConfig(**settings), **options)


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


def test_a_context_of_one_token_works(tiny):
    assert len(run(tiny(seq_len=1), [[1, 2, 3]], max_new_tokens=10).samples[0].tokens) == 10


def test_training_mode_is_as_before(tiny):
    for training in (True, False):
        model = tiny(dropout=0.5).train(training)
        first = run(model, [[1]], max_new_tokens=5).samples[0].tokens
        assert model.training is training
        assert run(model, [[1]], max_new_tokens=5).samples[0].tokens == first, "dropout is off"


class Script(torch.nn.Module):
    """A model that says what it is told, token by token."""

    def __init__(self, model, tokens):
        super().__init__()
        self.config, self.tokens, self.device, self.said = model.config, tokens, torch.device("cpu"), 0
        self.compute_dtype = torch.float32

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


def test_threads_are_as_many_as_have_something_to_do(tiny, monkeypatch):
    model, asked = tiny(), []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    run(model, [[1]], max_new_tokens=2)
    assert asked == [1, 4]
    assert useful_threads(model, 1) == 1 < useful_threads(model, 2**10) < useful_threads(model, 2**12)
    assert useful_threads(torch.nn.Linear(1024, 1024), 1) == 51 and useful_threads(torch.nn.Identity(), 1) == 1


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32)])
def test_quantized_matrices_have_work_for_a_quarter_of_the_threads(bits, group_size):
    model = torch.nn.Sequential(Linear(4096, 1024), Linear(1024, 4096))
    assert useful_threads(model, 1) == 204
    quantize_layers(model, Quantization(bits=bits, group_size=group_size, kept=[]))
    assert useful_threads(model, 1) == 51


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("n_sequences", [1, 2])
def test_int8_matrices_write_what_the_same_weights_in_float_do(tiny, name, n_sequences, tmp_path, monkeypatch):
    if not quantized_matmul.has_c_matmul():
        pytest.skip("matmuls of this machine round activations to 8 bits")
    monkeypatch.setattr(quantized, "SMALL_MATRIX", 0)
    state, model = quantized_state(sharp(tiny(name)), INT8), tiny(name)
    quantize_layers(model, INT8)
    fill_model(model, widen(state), tmp_path, torch.device("cpu"), "fp32")
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert layers and all(layer.kernel(torch.float32) == 16 for layer in layers)
    settings = dict(greedy=n_sequences == 1, num_samples=n_sequences, max_new_tokens=20)
    written = [sample.tokens for sample in run(model, [[60, 3]], **settings).samples]
    dequantize_layers(model)
    assert [sample.tokens for sample in run(model, [[60, 3]], use_cache=False, **settings).samples] == written
