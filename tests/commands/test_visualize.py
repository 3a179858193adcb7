"""`nnx visualize`: on the screen, as JSON, as a page, and what it refuses."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from reporting.hostile import HOSTILE, OURS, tags
from reporting.snapshots import course

import nnx_cli
from nnx_cli.runs.snapshots import save_snapshot

SMALL = "--dim 32 --n-layers 2 --n-heads 2 --seq-len 32 --batch-size 2 --grad-accum 1 --threads 1 --max-steps 2".split()
PROMPT = "the old cat"
STILL = """

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.out = Linear(config.dim, config.dim)

    def forward(self, x, tables, cache):
        return self.out(x)
"""


@pytest.fixture
def train(nnx, text_file):
    def make(*words):
        assert nnx("train", "--filepath", text_file, "--tokenizer", "byte", *SMALL, *words).exit_code == 0

    return make


def test_the_last_token_is_shown_by_layer_and_head(run, nnx):
    result = nnx("visualize", "words", "--prompt", PROMPT)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0] == "weights/words (nyx): 11 tokens, 2 layers that attend"
    start = lines.index("    1  2")
    table = lines[start + 1 : start + 12]
    assert [line[:3] for line in table] == [repr(letter) for letter in PROMPT]
    assert "xPos decay" in lines and max(map(len, lines)) <= 80 and "\x1b" not in result.output
    columns = [[line.ljust(9)[at] for line in table] for at in (4, 5, 7, 8)]
    assert all("█" in column and set(column) <= set(" ░▒▓█") for column in columns)


def test_json_has_what_is_shown(run, nnx):
    found = json.loads(nnx("visualize", "words", "--prompt", PROMPT, "--json").stdout)
    assert found["model"] == "weights/words" and found["architecture"] == "nyx" and found["prompt"] == PROMPT
    assert found["tokens"] == [repr(letter) for letter in PROMPT] and found["ids"] == list(PROMPT.encode())
    assert found["layers"] == ["layer 1", "layer 2"] and "maps" not in found and found["out"] is None
    assert [[sum(head) for head in layer] for layer in found["attention"]] == [[pytest.approx(1, abs=1e-4)] * 2] * 2
    assert {panel["title"] for panel in found["panels"]} == {"Heads", "xPos decay"}
    closer = json.loads(nnx("visualize", "words", "--prompt", PROMPT, "--layer", 2, "--head", 1, "--json").stdout)
    assert len(closer["maps"]) == 1 and closer["maps"][0][-1] == found["attention"][1][0]
    assert closer["maps"][0][0] == [1] + [0] * 10


def test_a_layer_and_a_head_are_seen_closer(run, nnx):
    found = json.loads(nnx("visualize", "words", "--prompt", PROMPT, "--layer", 2, "--json").stdout)
    layer = nnx("visualize", "words", "--prompt", PROMPT, "--layer", 2).stdout
    row = re.search(r"^'c'\s+(\d+)\s+(\d+)$", layer, re.MULTILINE)
    assert [int(share) for share in row.groups()] == [round(100 * head[-1][8]) for head in found["maps"]]
    assert "layer 2, head 2" in layer and "layer 1, head" not in layer
    head = nnx("visualize", "words", "--prompt", PROMPT, "--layer", 2, "--head", 2).stdout
    assert re.search(r"^'t' █ +'t' 100 %$", head, re.MULTILINE) and max(map(len, head.splitlines())) <= 80


@pytest.mark.parametrize("name", ["llama", "ngpt", "n4", "neon", "tape"])
def test_every_architecture_is_shown(train, nnx, name):
    bank = ["--decoder", "function"] if name == "neon" else []
    train("--model", name, *bank)
    result = nnx("visualize", "--prompt", PROMPT)
    own = {"llama": "Heads", "ngpt": "Steps", "n4": "Copying gate", "neon": "Functions chosen", "tape": "Segments"}
    assert result.exit_code == 0 and own[name] in result.stdout.splitlines() and result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert ("Values below 0 are - and" in " ".join(result.stdout.split())) == (name == "n4")
    if name == "tape":
        assert re.search(r"^ +coda +critic 1 +moderator$", result.stdout, re.MULTILINE)
        assert re.search(r"^'t'( +\S.* [01]\.\d\d){3}$", result.stdout, re.MULTILINE)
    page = nnx("visualize", "--prompt", PROMPT, "--html", "page.html")
    assert page.exit_code == 0 and own[name] in Path("page.html").read_text(encoding="utf-8")
    assert page.stdout.startswith("page.html: ") and page.stdout.count("\n") == 1


def test_what_was_made_of_a_run_is_shown(run, train, nnx):
    assert nnx("quantize", "words", "--bits", 4, "--max-drop", 9, "--out", "weights/four").exit_code == 0
    assert nnx("visualize", "four", "--prompt", PROMPT).exit_code == 0
    assert nnx("visualize", "words@20", "--prompt", PROMPT).exit_code == 0
    train("--init-from", "words", "--lora-rank", 2, "--out", "weights/adapter")
    assert nnx("visualize", "adapter", "--prompt", PROMPT).exit_code == 0


def test_the_end_of_a_long_prompt_is_kept(run, nnx):
    result = nnx("visualize", "words", "--prompt", "x" * 40 + PROMPT, "--json")
    assert len(json.loads(result.stdout)["ids"]) == 32
    result = nnx("visualize", "words", "--prompt", "x" * 40 + PROMPT)
    assert "the prompt has 51 tokens; the model sees the last 32" in result.stderr
    assert [line[:3] for line in result.stdout.splitlines() if line.startswith("'c'")] == ["'c'"]


def test_maps_have_to_fit_into_memory(run, nnx, monkeypatch):
    monkeypatch.setattr("nnx_cli.commands.visualize.MOST_WEIGHTS", 4 * 7**2)
    result = nnx("visualize", "words", "--prompt", PROMPT)
    assert "room for 7 tokens" in result.stderr and "7 tokens, 2 layers" in result.stdout


@pytest.mark.parametrize("prompt", ["\x1b[31mred\x07", "</pre><script>alert(1)</script>", "\u202egnp", "小猫", "\n\t "])
def test_a_hostile_prompt_breaks_nothing(run, nnx, prompt):
    result = nnx("visualize", "words", "--prompt", prompt)
    assert result.exit_code == 0 and not {"\x1b", "\x07", "\u202e"} & set(result.output)
    assert nnx("visualize", "words", "--prompt", prompt, "--html", "page.html").exit_code == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<script" not in page and not {"\x1b", "\x07", "\u202e"} & set(page)
    assert nnx("visualize", "words", "--prompt", prompt, "--html", "page.html").exit_code == 0  # its own page again


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (2, "--prompt is missing, and weights/words kept nothing", []),
        (2, "--device does nothing without --prompt", ["--device", "cpu"]),
        (2, "--prompt is empty", ["--prompt", ""]),
        (2, "--layer is 3; this model has layers 1 to 2", ["--prompt", "a", "--layer", 3]),
        (2, "--layer is 0", ["--prompt", "a", "--layer", 0]),
        (2, "--head is -1; layer 1 has heads 1 to 2", ["--prompt", "a", "--layer", 1, "--head", -1]),
        (2, "--head needs the layer", ["--prompt", "a", "--head", 1]),
        (2, "--layer and --html", ["--prompt", "a", "--layer", 1, "--html", "page.html"]),
        (8, "was not written by this command", ["--prompt", "a", "--html", "notes.html"]),
        (8, "is a folder", ["--prompt", "a", "--html", "weights"]),
    ],
)
def test_what_is_refused(run, refused, code, message, words):
    Path("notes.html").write_text("mine")
    refused(code, message, "visualize", "words", *words)


def test_standard_input_has_to_hold_something(run, nnx, refused):
    assert "weights/words (nyx): 3 tokens" in nnx("visualize", "words", "--prompt", "-", input="abc").stdout
    refused(3, "standard input is empty", "visualize", "words", "--prompt", "-", input="")


def test_there_has_to_be_a_model(workspace, refused):
    refused(5, "", "visualize", "nothing", "--prompt", "a")


def test_an_architecture_of_ones_own_shows_its_attention_if_it_has_any(train, nnx, refused):
    source = (Path(nnx_cli.__file__).parent / "models" / "llama.py").read_text(encoding="utf-8")
    Path("mine.py").write_text(source, encoding="utf-8")
    before, _, rest = source.partition("\n\nclass Attention")
    still = before + STILL + "\n\nclass MLP" + rest.partition("\n\nclass MLP")[2]
    still = still.replace("if cache is not None and x.shape[1] == 1:", "if False:")  # whose step knows attention alone
    Path("still.py").write_text(still, encoding="utf-8")
    train("--model", "mine.py", "--out", "weights/mine")
    assert nnx("visualize", "mine", "--model", "mine.py", "--prompt", PROMPT).exit_code == 0
    train("--model", "still.py", "--out", "weights/still", "--sample-every", 0)
    refused(2, "has nothing to show", "visualize", "still", "--model", "still.py", "--prompt", PROMPT)


def test_screens_without_blocks_get_letters(run, nnx, monkeypatch):
    monkeypatch.setattr("nnx_cli.console.shades.BLOCKS", " \udcff")  # which no encoding has
    out = nnx("visualize", "words", "--prompt", PROMPT).stdout
    assert "#" in out and "█" not in out


def test_a_model_of_many_heads_is_shown_by_layer(train, nnx):
    train("--dim", 384, "--n-heads", 48, "--head-dim", 8)
    result = nnx("visualize", "--prompt", PROMPT)
    assert "Too many heads for this screen" in result.stdout and "'c' " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_tokens_that_are_no_characters_are_bytes(run, nnx):
    shutil.rmtree(run.folder / "checkpoints")
    assert r"'\xe5" in nnx("visualize", "words", "--prompt", "小").stdout


@pytest.fixture
def kept(run):
    for snapshot in course(3):
        save_snapshot(run.folder, snapshot)
    return run.folder / "insides"


def test_what_a_run_kept_is_shown_without_a_prompt(kept, nnx):
    result = nnx("visualize", "words")
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.splitlines()[0] == "weights/words (nyx) after step 300: 4 tokens, 3 layers that attend"
    learned = result.stdout.partition("As it learned")[2]
    assert re.search(r"^  step +surprise +weights +activations +up +down", learned, re.MULTILINE)
    assert re.search(r"^  100 .* 0\.100 +0\.100", learned, re.MULTILINE) and "always" not in learned
    assert max(map(len, learned.splitlines())) <= 80
    assert "layer 2, head 1" in nnx("visualize", "words", "--layer", 2).stdout
    assert "head 2" in nnx("visualize", "words", "--layer", 3, "--head", 2).stdout
    found = json.loads(nnx("visualize", "words", "--json").stdout)
    assert found["prompt"] is None and found["steps"] == [100, 200, 300] and found["tokens"][0] == "'a'"


def test_a_page_shows_how_it_learned(kept, nnx):
    for words in ([], ["--prompt", PROMPT]):
        assert nnx("visualize", "words", *words, "--html", "page.html").exit_code == 0
        page = Path("page.html").read_text(encoding="utf-8")
        assert "Inside the model as it learned" in page and page.count("class=strip") == 3


def test_an_earlier_checkpoint_is_shown_as_it_came_to_be(kept, nnx):
    (kept / "step-00000300.safetensors").rename(kept / "step-00000040.safetensors")  # no snapshot of that step
    for snapshot in course(1):
        save_snapshot(kept.parent, replace(snapshot, step=20))
    result = nnx("visualize", "words@20", "--json")
    assert json.loads(result.stdout)["steps"] == [20]
    result = nnx("visualize", "words")
    assert result.exit_code == 0 and "step-00000040.safetensors is damaged" in result.stderr


@pytest.mark.parametrize("width", [80, 30])
def test_hostile_names_in_what_a_run_kept_break_nothing(run, nnx, monkeypatch, width):
    for snapshot in course(2, tokens=HOSTILE, text=HOSTILE):
        panels = [
            replace(panel, title=HOSTILE[5], about=HOSTILE[5], rows=[HOSTILE[5]] * len(panel.rows))
            for panel in snapshot.insides.panels
        ]
        named = [replace(p, columns=p.columns and [HOSTILE[5]] * len(p.columns)) for p in panels]
        insides = replace(snapshot.insides, panels=named, layers=[HOSTILE[5]] * 3, about=HOSTILE[5])
        save_snapshot(run.folder, replace(snapshot, insides=insides))
    monkeypatch.setenv("COLUMNS", str(width))
    for words in ([], ["--layer", 1], ["--layer", 1, "--head", 1], ["--json"], ["--html", "page.html"]):
        result = nnx("visualize", "words", *words)
        assert result.exit_code == 0, result.stderr
        assert not {"\x1b", "\x07", "\u202e", "\x00"} & set(result.output)
    assert tags(Path("page.html").read_text(encoding="utf-8")) <= OURS
