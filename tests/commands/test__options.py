"""Which options a path of a command reads: what it does not read is refused, what is not refused is read."""

import dataclasses
import gc
import json
import shutil
import sys
from pathlib import Path

import pytest

from nnx_cli.commands import _options, _train_options, train
from nnx_cli.commands._options import COMMAND_LINE, AllBut, Branch, check_read
from nnx_cli.config import PrepareConfig, QuantizeConfig, SampleConfig, TrainConfig
from nnx_cli.errors import UsageError

SHAPE = "--dim 32 --n-layers 1 --n-heads 2 --seq-len 16 --batch-size 2 --grad-accum 1 --threads 1 --compile off"
SHORT = "--max-steps 4 --val-every 2 --val-batches 1 --sample-every 0"
ON_TOKENS = f"train --data data/words {SHAPE} {SHORT} --out new"
ON_TEXT = f"train --filepath words.txt {SHAPE} {SHORT} --out new"
ON_DOCUMENTATION = f"train {SHAPE} {SHORT} --out new"
ON_A_RUN = f"train --data data/words --init-from words --batch-size 2 --grad-accum 1 {SHORT} --out new"
SPEAKING = ON_TOKENS.replace("every 0", "every 4")
SAMPLING = "sample words --prompt the --max-new-tokens 40 --num-samples 2"
TEXT, ROWS = "prepare words.txt --out new", "prepare rows.jsonl --out new"


@pytest.fixture
def files(run, workspace, text):
    """Text, rows and a run in the current folder."""
    (workspace / "words.txt").write_text(text, encoding="utf-8")
    (workspace / "held.txt").write_text(text[::-1], encoding="utf-8")
    rows = [{"text": line, "body": line[::-1]} for line in text.splitlines()]
    (workspace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (workspace / "books").mkdir()
    (workspace / "books" / "one.md").write_text(text, encoding="utf-8")
    (workspace / "broken.txt").write_bytes(text.encode()[:2000] + b"\xe5\xb0 bad\n" + text.encode())
    return workspace


# an option, a path that does not read it, one that does
IDLE = [
    ("--val-fraction 0.3", f"{TEXT} --val held.txt", TEXT),
    ("--text-key body", TEXT, ROWS),
    ("--text-key body", "prepare words.txt --val held.txt --out new", "prepare words.txt --val rows.jsonl --out new"),
    ("--val-fraction 0.3", ON_TOKENS, ON_TEXT),
    ("--errors strict", ON_TOKENS, ON_TEXT.replace("words", "broken")),
    ("--text-key body", ON_TOKENS, ON_TEXT.replace("words.txt", "rows.jsonl")),
    ("--errors strict", ON_DOCUMENTATION, ON_TEXT.replace("words", "broken")),
    ("--text-key body", ON_DOCUMENTATION, ON_TEXT.replace("words.txt", "rows.jsonl")),
    ("--text-key body", ON_TEXT, ON_TEXT.replace("words.txt", "rows.jsonl")),
    ("--tokenizer char", ON_A_RUN.replace("--data data/words", "--filepath words.txt"), ON_TEXT),
    ("--min-lr 1e-4", f"{ON_TOKENS} --schedule constant", f"{ON_TOKENS} --schedule cosine"),
    ("--beta2 0.5", f"{ON_TOKENS} --optimizer lion", f"{ON_TOKENS} --optimizer adamw8bit"),
    ("--beta2 0.5", f"{ON_TOKENS} --optimizer wolf", f"{ON_TOKENS} --optimizer muon"),
    ("--sample-prompt a", ON_TOKENS, SPEAKING),
    ("--prime_length 5", ON_TOKENS, SPEAKING),
    ("--generate_length 5", ON_TOKENS, SPEAKING),
    ("--sample-prompt a", f"{SPEAKING} --prime_length 5", SPEAKING),
    ("--patience 3", ON_TOKENS, f"{ON_TOKENS} --lr 0.3 --val-every 1 --max-steps 12"),
    ("--qk-norm-scale 2", ON_TOKENS, f"{ON_TOKENS} --qk-norm"),
    ("--top-k 2", f"{SAMPLING} --greedy", SAMPLING),
    ("--top-p 0.1", f"{SAMPLING} --greedy", SAMPLING),
    ("--min-p 0.9", f"{SAMPLING} --temperature 0", SAMPLING),
    ("--seed 8", f"{SAMPLING} --temperature 0", SAMPLING),
    ("--temperature 2", f"{SAMPLING} --greedy", SAMPLING),
    ("--model_dim 64", SAMPLING, SAMPLING.replace("words ", "")),
    ("--sample_prompt a", SAMPLING, SAMPLING.replace("--prompt the", "")),
    ("--generate_length 3", SAMPLING, SAMPLING.replace("--max-new-tokens 40", "")),
    ("--group-size 8", "quantize words --max-drop 9 --out new", "quantize words --bits 4 --max-drop 9 --out new"),
    ("--errors strict", "eval words", "eval words --filepath broken.txt"),
    ("--text-key body", "eval words", "eval words --filepath rows.jsonl"),
    ("--text-key body", "eval words --filepath words.txt", "eval words --filepath rows.jsonl"),
    ("--size tiny", "summarize words", "summarize --model nyx"),
    ("--n-layers 3", "summarize words", "summarize --model nyx --size nano"),
]


@pytest.mark.parametrize(
    "line",
    [
        f"{ON_TOKENS} --patience 11".replace("--val-every 2 ", ""),
        f"{ON_TOKENS} --patience 3".replace("--val-every 2 ", ""),
        f"{ON_TOKENS} --qk-norm-scale 2",
        f"{ON_TOKENS} --model tape --variant sound --n-critics 1",
        "train --resume words --checkpoint_path weights/words",
        "train --resume words --prime_length 3",
        "train --resume words --filepath words.txt",
        "train --resume words --learning_rate 0.1",
        "train --checkpoint_path weights/words --min-lr 0.1",
        "train --checkpoint_path x.pth --init-from words",
        "summarize --all --model llama",
        "summarize words --model llama",
        "summarize words --all",
        "summarize --model neon --function-temperature 2",
        "prepare books --text-key body --out new",
        "prepare w*.txt words.txt --text-key body --out new",
        "sample words --stop",
    ],
)
def test_more_that_does_nothing(refused, files, line):
    words = line.split()
    result = refused(2, " does nothing ", *words, *([""] if words[-1] == "--stop" else []))
    assert any(word in result.stderr for word in words if word.startswith("--"))


def test_what_disagrees_with_nothing_is_taken(nnx, files):
    for line in (
        f"{ON_A_RUN} --tokenizer byte --dry-run",
        f"{ON_TOKENS} --tokenizer byte --dry-run",
        f"{ON_TOKENS} --schedule constant --warmup-steps 2 --dry-run",
        "sample words --greedy --temperature 0 --repetition-penalty 2 --max-new-tokens 2",
        "train --checkpoint_path weights/words --filepath words.txt",
        "summarize words --vram 8GB --precision fp32",
        "prepare . --text-key text --out new",
    ):
        done = nnx(*line.split())
        assert done.exit_code == 0, done.stderr


def test_a_settings_file_may_hold_what_a_command_does_not_read(nnx, files):
    lines = [
        "val_fraction = 0.3",
        "min_lr = 1e-5",
        'schedule = "constant"',
        'tokenizer = "char"',
        "sample_prompt = 'a'",
    ]
    (files / "my.toml").write_text("\n".join(lines))
    words = f"{ON_A_RUN} --config my.toml".split()
    done = nnx(*words, "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    rows = {row["setting"]: row for row in json.loads(done.stdout)}
    assert rows["min_lr"]["value"] == 0 and rows["min_lr"]["source"] == "default"
    notes = nnx(*words, "--dry-run").stderr
    for name in ("val_fraction", "min_lr", "tokenizer", "sample_prompt"):
        assert f"file: my.toml: {name} does nothing " in notes
    assert "schedule does" not in notes
    refused = nnx(*words, "--min-lr", "1e-5")
    assert refused.exit_code == 2 and "--min-lr does nothing with --schedule constant" in refused.stderr


def test_an_optimizer_that_is_chosen_later_reads_no_beta2_either(nnx, files, monkeypatch):
    monkeypatch.setattr("nnx_cli.planning.plan.preferred_optimizer", lambda *_: "lion")
    done = nnx(*f"{ON_TOKENS} --beta2 0.9".split())
    assert done.exit_code == 2 and "--beta2 does nothing with --optimizer lion" in done.stderr
    assert not Path("new").exists()


def test_tokens_are_of_the_tokenizer_that_is_named(nnx, files):
    assert nnx("prepare", "words.txt", "--tokenizer", "char", "--out", "chars", "--quiet").exit_code == 0
    for folder, tokenizer, code in (("chars", "char", 0), ("chars", "byte", 3), ("data/words", "char", 3)):
        assert nnx("train", "--data", folder, "--tokenizer", tokenizer, "--dry-run").exit_code == code


def test_branches_name_options_that_there_are():
    """A branch for an option of another name would never refuse anything."""
    from nnx_cli.cli import COMMANDS, _load

    for command, (module, _) in COMMANDS.items():
        branches = getattr(__import__(f"nnx_cli.commands.{module}", fromlist=["run"]), "BRANCHES", ())
        if command == "train":
            branches = _train_options.BRANCHES
        known = {param.name for param in _load(command).params}
        for branch in branches:
            names = branch.reads.names if isinstance(branch.reads, AllBut) else branch.reads
            assert set(names) <= known, command


def test_a_branch_may_be_inside_another():
    outer = Branch({"a", "b"}, lambda v: v["x"], "without --x")
    inner = Branch(AllBut("a"), lambda v: v["y"] == 1, "with --y {y}", "take --y 1")
    for values, names, message in (
        ({"x": 0, "y": 1}, ["a", "b", "c"], "--a and --b do nothing without --x"),
        ({"x": 1, "y": 2}, ["a", "b"], "--b does nothing with --y 2"),
        ({"x": 1, "y": 1}, ["a", "b", "c"], None),
        ({"x": 0, "y": 0}, [], None),
    ):
        sources = dict.fromkeys(names, COMMAND_LINE)
        if message is None:
            assert check_read((outer, inner), values, sources) == {}
        else:
            with pytest.raises(UsageError, match=message):
                check_read((outer, inner), values, sources)
    assert check_read((outer, inner), {"x": 0, "y": 2}, {"a": "file: f", "c": "file: f"}) == {
        "a": "file: f: a does nothing without --x",
        "c": "file: f: c does nothing with --y 2",
    }


def outcome(nnx, line):
    """What a command line leaves behind and prints, without times and without what it was told."""
    done, out = nnx(*line.split(), "--json"), Path("new")
    if done.exit_code:
        shutil.rmtree(out, ignore_errors=True)
        return done.exit_code
    found = [path.read_bytes() for path in sorted(out.glob("*.safetensors")) + sorted(out.glob("*.bin"))]
    if (log := out / "metrics.jsonl").exists():
        found += [json.loads(line)["train_loss"] for line in log.read_text().splitlines()]
        samples = out / "samples.jsonl"
        found += [samples.read_text()] if samples.exists() else []
    else:
        product = json.loads(done.stdout)
        found += [product] if isinstance(product, list) else [product.get(key) for key in WITHOUT_TIMES]
    shutil.rmtree(out, ignore_errors=True)
    return found


WITHOUT_TIMES = ["samples", "loss", "tokens", "parameters", "flops_per_token", "memory"]


@pytest.fixture(scope="module")
def usual():
    """What lines without the option leave behind, by line: the files they find are always the same."""
    return {}


@pytest.mark.parametrize(("option", "idle", "taken"), IDLE, ids=lambda words: words[:60])
def test_what_a_path_does_not_read_is_refused_and_changes_nothing_there(
    nnx, refused, files, usual, monkeypatch, option, idle, taken
):
    name = option.split()[0]
    typed = name if "_dim" in name else name.replace("_", "-")
    result = refused(2, f"{typed} does nothing ", *idle.split(), *option.split())
    assert len(result.stderr.splitlines()) == 2, "what to do stands in the next line"
    for line in {idle, taken} - usual.keys():
        usual[line] = outcome(nnx, line)
    assert outcome(nnx, f"{taken} {option}") != usual[taken], "the path that reads it"
    for module in (_options, _train_options, train):
        monkeypatch.setattr(module, "check_read", lambda *_: {})
    assert outcome(nnx, f"{idle} {option}") == usual[idle] != 2, "the path that is said not to"


# every setting is read where it is not refused

PATHS = {
    "prepare": (TEXT, [PrepareConfig]),
    "prepare with rows": (ROWS, [PrepareConfig]),
    "prepare with text to validate on": (f"{TEXT} --val held.txt", [PrepareConfig]),
    "train on text": (ON_TEXT, [TrainConfig, PrepareConfig]),
    "train on rows": (ON_TEXT.replace("words.txt", "rows.jsonl"), [TrainConfig, PrepareConfig]),
    "train on tokens": (f"{ON_TOKENS} --tokenizer byte", [TrainConfig, PrepareConfig]),
    "train on the documentation": (ON_DOCUMENTATION, [TrainConfig, PrepareConfig]),
    "train from a model": (ON_A_RUN, [TrainConfig, PrepareConfig]),
    "train adapters": (f"{ON_A_RUN} --lora-rank 2", [TrainConfig, PrepareConfig]),
    "resume": ("train --resume words --max-steps 42", [TrainConfig, PrepareConfig]),
    "sample": (SAMPLING, [SampleConfig]),
    "sample greedily": (f"{SAMPLING} --greedy", [SampleConfig]),
    "quantize to 8 bits": ("quantize words --max-drop 9 --out new", [QuantizeConfig]),
    "quantize to 4 bits": ("quantize words --bits 4 --max-drop 9 --out new", [QuantizeConfig]),
    "eval": ("eval words", []),
    "eval of text": ("eval words --filepath rows.jsonl", []),
}
SEEN_OTHERWISE = {  # by the branches of the plan, and as properties
    "max_time": "max_time_s",
    "vram": "vram_bytes",
    "log_to": "trackers",
}
OF_OTHERS = {"vocab_size", "workers", "max_memory_bytes", "xray"}  # of PrepareConfig, which train has not


@pytest.fixture
def reads(monkeypatch):
    """Names of the settings that code reads, other than to copy, check and write down all of them."""
    seen = set()

    def watch(config, name):
        where = sys._getframe(1).f_code.co_filename
        if not (where.startswith("<") or where.endswith(("dataclasses.py", "config.py"))):
            seen.add(name)
        return object.__getattribute__(config, name)

    for config in (PrepareConfig, TrainConfig, SampleConfig, QuantizeConfig):
        monkeypatch.setattr(config, "__getattribute__", watch)
    return seen


@pytest.mark.parametrize(("line", "configs"), PATHS.values(), ids=PATHS)
def test_what_is_not_refused_is_read(nnx, files, monkeypatch, reads, line, configs):
    asked = []

    def watched(branches, values, *rest):
        asked.append((branches, values))
        return check_read(branches, values, *rest)

    for module in (_options, _train_options, train):
        monkeypatch.setattr(module, "check_read", watched)
    done = nnx(*line.split())
    assert done.exit_code == 0, done.stderr

    def is_refused(name):
        try:
            for branches, values in asked:
                check_read(branches, values | {name: values.get(name) or 1}, {name: COMMAND_LINE})
        except UsageError:
            return True
        return False

    names = {field.name for config in configs for field in dataclasses.fields(config)}
    names -= OF_OTHERS if TrainConfig in configs else set()
    unread = {name for name in names if SEEN_OTHERWISE.get(name, name) not in reads}
    assert unread <= {name for name in names if is_refused(name)}


def test_garbage_is_collected_as_soon_as_a_command_begins():
    collects = []

    @_options.command()
    def run(output):
        collects.append(gc.isenabled())

    gc.disable()  # as `nnx` does while it starts
    try:
        run(json=False, quiet=False, debug=False)
    finally:
        gc.enable()
    assert collects == [True]
