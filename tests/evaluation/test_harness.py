"""The adapter for lm-evaluation-harness, on tasks of our own: no network. Skipped where the extra is not installed."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra nnx-cli[eval] is not installed")

from nnx_cli.commands._depth import load_tasks
from nnx_cli.console.output import Output
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.errors import DataError, UsageError
from nnx_cli.evaluation import harness
from nnx_cli.evaluation.harness import HarnessModel, find_tasks
from nnx_cli.layers.loss import token_losses

START, T = [10], 32


def ask(*args):
    return SimpleNamespace(args=args)


@pytest.fixture
def model(tiny):
    return tiny(vocab_size=256)


@pytest.fixture
def lm(model):
    return HarnessModel(model, ByteTokenizer(), START, lambda prompts, config, stops: [])


def by_hand(model, context, text):
    """Log-likelihood of ids `text` after ids `context`, all within one window; and whether it is the likeliest."""
    ids = torch.tensor([[*context, *text]])
    n = len(text)
    losses = token_losses(model.eval(), ids[:, :-1], ids[:, 1:])[0, -n:]
    greedy = model(ids[:, :-1]).argmax(-1)[0, -n:].tolist() == list(text)
    return -losses.sum().item(), greedy


@pytest.mark.parametrize(
    ("context", "text"),
    [("the cat", " sees"), ("", "dog"), ("ends with spaces  ", "x"), ("a", "ü"), ("x" * 31, "y"), ("line\n", "z")],
)
def test_loglikelihood(lm, model, context, text):
    before = context.rstrip().encode() or bytes(START)
    wanted, greedy = by_hand(model, before, (context + text).encode()[len(context.rstrip().encode()) :])
    ((found, is_greedy),) = lm.loglikelihood([ask(context, text)])
    assert found == pytest.approx(wanted, rel=1e-5) and is_greedy is greedy


class Latin(ByteTokenizer):
    """Any id can be written."""

    def encode(self, text):
        return np.frombuffer(text.encode("latin-1"), np.uint8)


def test_the_likeliest_continuation_is_greedy(model):
    ids = list(b"the cat")
    for _ in range(3):
        ids.append(int(model.eval()(torch.tensor([ids]))[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 256]
    texts = [bytes(each[7:]).decode("latin-1") for each in (ids, other)]
    found = HarnessModel(model, Latin(), START, None).loglikelihood([ask("the cat", text) for text in texts])
    assert [greedy for _, greedy in found] == [True, False] and found[0][0] > found[1][0]


def test_a_long_context_keeps_its_end(lm, model):
    context = "0123456789" * 7
    ((found, _),) = lm.loglikelihood([ask(context, "ab")])
    assert found == pytest.approx(by_hand(model, (context + "ab").encode()[-T - 1 : -2], b"ab")[0], rel=1e-5)


@pytest.mark.parametrize("n", [1, T - 1, T, T + 1, 2 * T, 2 * T + 5])
def test_a_whole_text_is_read_in_windows_that_are_full(lm, model, n):
    text = bytes(97 + i % 26 for i in range(n))
    ids, wanted = bytes(START) + text, 0.0
    for end in range(T, n + T, T):
        last = min(end, n)
        part = text[end - T : last]
        wanted += by_hand(model, ids[max(0, last - T) : 1 + end - T], part)[0]
    (found,) = lm.loglikelihood_rolling([ask(text.decode())])
    assert found == pytest.approx(wanted, rel=1e-5)


def test_requests_do_not_depend_on_their_company(lm, monkeypatch):
    requests = [ask("a" * n, "bc" * m) for n in (1, 9, 40) for m in (1, 3, 30)] + [ask("a", "")]
    together = lm.loglikelihood(requests)
    monkeypatch.setattr(harness, "BATCH_TOKENS", 1)
    alone = [lm.loglikelihood([request])[0] for request in requests]
    assert [nats for nats, _ in together] == pytest.approx([nats for nats, _ in alone], rel=1e-5)
    assert together[-1] == (0.0, True)


def test_text_is_drawn_as_the_task_asks(model, monkeypatch):
    calls = []

    def write(prompts, config, stops):
        calls.append((len(prompts), config, stops))
        return [bytes(prompt).decode().upper() for prompt in prompts]

    lm = HarnessModel(model, ByteTokenizer(), START, write)
    monkeypatch.setattr(harness, "PROMPTS_PER_BATCH", 2)
    plain, drawn = {"until": ["\n"], "max_gen_toks": 7}, {"until": "stop", "do_sample": True, "temperature": 0.5}
    requests = [ask("a", plain), ask("b", drawn), ask("c", plain), ask("", plain), ask("d", {"temperature": 0.9})]
    assert lm.generate_until(requests) == ["A", "B", "C", "\n", "D"]
    assert [(n, config.max_new_tokens, config.greedy, stops) for n, config, stops in calls] == [
        (2, 7, True, ["\n"]),
        (1, 7, True, ["\n"]),
        (1, 256, False, ["stop"]),
        (1, 256, True, []),
    ]
    assert calls[2][1].temperature == 0.5


def test_unknown_tasks_have_a_nearest_one(tmp_path, monkeypatch):
    known = SimpleNamespace(all_tasks=["lambada_openai", "arc_easy"])  # to read all takes many seconds
    monkeypatch.setattr(harness, "TaskManager", lambda include_defaults: known)
    assert find_tasks(["arc_easy"]) is known
    with pytest.raises(UsageError, match="did you mean lambada_openai"):
        find_tasks(["lambada_openay"])
    with pytest.raises(UsageError, match="no task"):
        find_tasks([str(tmp_path / "missing.yaml")])


def test_a_model_over_bare_ids_reads_no_tasks():
    bare = SimpleNamespace(tokenizer=None, label="weights/bare")
    with pytest.raises(DataError, match="weights/bare has no tokenizer"):
        load_tasks(Output(), bare, ["choice"], None)


DOCS = [
    {"question": "the cat sees the", "choices": [" dog", " qqqqq"], "answer": 0, "text": "the old dog likes a river"},
    {"question": "a tree and", "choices": [" zzzzz", " a"], "answer": 1, "text": "light under a stone"},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}, cache_dir: {cache}}}
test_split: {split}
output_type: {kind}
doc_to_text: "{{{{{asked}}}}}"
doc_to_target: "{{{{{wanted}}}}}"
{more}
"""
KINDS = {
    "choice": dict(kind="multiple_choice", asked="question", wanted="answer", more='doc_to_choice: "{{choices}}"'),
    "whole": dict(
        kind="loglikelihood_rolling", asked="''", wanted="text", more="metric_list: [{metric: bits_per_byte}]"
    ),
    "writes": dict(
        kind="generate_until",
        asked="question",
        wanted="text",
        more='generation_kwargs: {until: ["\\n"], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]',
    ),
}


@pytest.fixture
def task(workspace):
    """Writes the file of a task: task(name, changed fields) returns its path."""
    (workspace / "docs.jsonl").write_text("\n".join(map(json.dumps, DOCS)) + "\n", encoding="utf-8")

    def write(name, **changed):
        fields = dict(name=name, docs=workspace / "docs.jsonl", cache=workspace / "cache", split="test") | KINDS[name]
        path = workspace / f"{name}.yaml"
        path.write_text(TASK.format(**(fields | changed)), encoding="utf-8")
        return path

    return write


def test_tasks_of_ones_own_from_the_command_line(nnx, run, task):
    from nnx_cli.runs.find import find_model
    from nnx_cli.runs.load import load_model

    files = ",".join(str(task(name)) for name in KINDS)
    done = nnx("eval", "--tasks", files, "--json")
    assert done.exit_code == 0 and done.stderr == ""
    found = json.loads(done.stdout)["tasks"]
    assert list(found) == list(KINDS) and 0 <= found["choice"]["acc"] <= 1 and "acc_stderr" in found["choice"]
    assert found["writes"]["exact_match"] == 0
    model = load_model(find_model("words"), torch.device("cpu"))
    nats = sum(by_hand(model, START, doc["text"].encode())[0] for doc in DOCS)
    n_bytes = sum(len(doc["text"]) for doc in DOCS)
    assert found["whole"]["bits_per_byte"] == pytest.approx(-nats / n_bytes / math.log(2), rel=1e-5)
    shown = nnx("eval", "--tasks", task("choice")).stdout
    assert "choice" in shown and "acc" in shown


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(docs="/nowhere/docs.jsonl"), "Unable to find"),
        (dict(kind="dance"), "invalid output_type"),
        (dict(split="missing"), "missing"),
        (dict(asked="nothing.at.all"), "is undefined"),
        (dict(more="x: ["), "while parsing"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_task_that_does_not_work(nnx, run, task, changed, words):
    done = nnx("eval", "--tasks", task("choice", **changed))
    problem = [line for line in done.stderr.splitlines() if line.startswith("nnx: ")]
    assert done.exit_code == 3 and len(problem) == 1 and "does not work" in problem[0] and words in problem[0]
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr
