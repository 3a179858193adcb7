"""The coach: every rule on a run with that fault, and silent on healthy ones."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from nnx_cli.evaluation.by_position import Verdict
from nnx_cli.reporting.coach import findings, unused_context
from nnx_cli.reporting.run_record import RunRecord

STEPS = 1000


def loss_at(step, last=1.4):
    return last + (5.5 - last) * math.exp(-step / 80)


def healthy(**more):
    """Lines of a run that falls steeply, then ever more slowly."""
    lines = []
    for step in range(1, STEPS + 1, 10):
        line = {
            "step": step,
            "tokens": step * 8192,
            "time_s": step * 0.2,
            "train_loss": loss_at(step),
            "val_loss": loss_at(step, 1.5) if step % 50 == 1 else None,
            "val_bits_per_byte": loss_at(step, 1.5) / math.log(2) if step % 50 == 1 else None,
            "lr": 1e-3,
            "grad_norm": 0.7,
            "tokens_per_s": 40_000.0,
            "peak_memory_bytes": 2**30,
            "skipped_steps": 0,
            "data_wait_share": 0.02,
        }
        lines.append(line | {name: make(step) for name, make in more.items()})
    return lines


def record(metrics=None, *, model=None, training=None, data=None, status=None, parameters=800_000, state="finished"):
    """A run of a nano nyx on 2 MB, 4 epochs, with what differs."""
    metrics = healthy() if metrics is None else metrics
    last = metrics[-1] if metrics else {}
    config = {
        "parameters": parameters,
        "model": {"name": "nyx", "size": "nano", "dim": 128, "vocab_size": 256, "dropout": 0.0} | (model or {}),
        "training": {"lr": 4e-3, "optimizer": "adamw", "precision": "bf16", "lora_rank": None} | (training or {}),
        "data": {"folder": "../../data/words", "train_tokens": 2_000_000, "ngram_bits_per_byte": 2.4} | (data or {}),
    }
    best = min((bits for line in metrics if isinstance(bits := line["val_bits_per_byte"], float)), default=None)
    told = {
        "status": state,
        "ended": "length",
        "command": "nnx train --model nyx --filepath my.txt --max-steps 1000 --out weights/words",
        "step": last.get("step"),
        "tokens": last.get("tokens"),
        "time_s": last.get("time_s"),
        "max_steps": STEPS,
        "best_val_bits_per_byte": best,
        "events": [],
    }
    folder = Path("weights") / "words"
    return RunRecord("words", folder, config, told | (status or {}), state, metrics, [], {})


def rules(run):
    return [found.rule for found in findings(run)]


def only(run):
    """The one finding of a run."""
    found = findings(run)
    assert len(found) == 1, found
    return found[0]


HEALTHY = {
    "a plain run": record(),
    "in fp16, which skips as its scale finds its place": record(
        healthy(skipped_steps=lambda step: min(12, step)), training={"precision": "fp16"}
    ),
    "with one spike": record(status={"events": ["loss spike: 4.100 up to step 300, after 1.700"]}),
    "compiled, and faster": record(status={"events": ["compiled: a step takes 71% of its time before"]}),
    "not compiled": record(status={"events": ["not compiled: no faster here"]}),
    "with validation that wavers at the end": record(
        healthy(val_loss=lambda step: loss_at(step, 1.5) + 0.005 * (step > 850) if step % 50 == 1 else None)
    ),
    "read as often as is useful": record(data={"train_tokens": 300_000}),
    "that has just begun": record(healthy()[:8], state="running"),
    "that only was begun": record(healthy()[:1], state="running"),
    "without a line": record([], state="running"),
    "with a low learning rate that is done learning": record(training={"lr": 1e-5}),
    "with adapters on another model": record(training={"lr": 1e-6, "lora_rank": 8}, parameters=10**9),
    "that waited for its first steps' data": record(healthy(data_wait_share=lambda step: 0.9 if step < 100 else 0.03)),
    "of a version that did not record waiting": record(healthy(data_wait_share=lambda step: None)),
    "without validation": record(healthy(val_loss=lambda step: None, val_bits_per_byte=lambda step: None)),
    "on ids that nobody can read": record(
        healthy(val_bits_per_byte=lambda step: None), data={"ngram_bits_per_byte": None}
    ),
    "of a version that recorded less of its data": record(
        data={"train_tokens": None, "ngram_bits_per_byte": None}, parameters=10**8
    ),
    "of an architecture of the user's": record(model={"name": "mine", "size": None, "file": "mine.py"}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_alone(name):
    assert findings(HEALTHY[name]) == []


@pytest.mark.parametrize("name", sorted(HEALTHY.keys() - {"with a low learning rate that is done learning"}))
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.51, 0.75, 0.9, 0.97])
def test_a_healthy_run_is_left_alone_while_it_goes_on(name, share):
    run = HEALTHY[name]
    lines = run.metrics[: int(share * len(run.metrics))]
    so_far = {key: lines[-1][key] if lines else None for key in ("step", "tokens", "time_s")}
    best = min((line["val_bits_per_byte"] for line in lines if line["val_bits_per_byte"]), default=None)
    status = run.status | so_far | {"ended": None, "best_val_bits_per_byte": best}
    assert findings(replace(run, metrics=lines, status=status, state="running")) == []


def test_one_validation_that_is_worse_is_no_overfitting_yet():
    def running(n_worse):
        lines = healthy(train_loss=memorising, val_loss=turning)
        last = 40 + 5 * n_worse  # the best is line 40, and every fifth is validated
        return record(lines[: last + 1], state="running")

    assert [rules(running(n)) for n in (1, 2)] == [[], ["overfitting"]]


def memorising(step):
    return loss_at(step, 0.4) if step < 400 else 0.4 - step / 10_000


def turning(step):
    return loss_at(step, 1.5) + max(0, step - 400) / 1000 if step % 50 == 1 else None


def test_overfitting():
    run = record(healthy(train_loss=memorising, val_loss=turning), model={"dropout": 0.1})
    found = only(run)
    assert found.rule == "overfitting" and "was 1.53 at step 401" in found.text and "training loss 0.3" in found.text
    assert found.command == (
        "nnx train --model nyx --filepath my.txt --max-steps 1000 --dropout 0.2 --out weights/words"
    )
    both = record(healthy(train_loss=lambda step: loss_at(step) + max(0, step - 400) / 1000, val_loss=turning))
    assert "overfitting" not in rules(both), "the training loss rose too"


@pytest.mark.parametrize(
    ("changes", "evidence"),
    [
        ({"metrics": healthy(train_loss=lambda step: 90.0 if step == 101 else loss_at(step))}, "was 90 on the way"),
        ({"state": "diverged"}, "the run diverged at step 991"),
        ({"status": {"events": ["no finite gradient in 8 steps up to step 40: back to step 0"]}}, "back to a check"),
        ({"status": {"events": ["loss spike: 4.1 up to step 3, after 1.7"] * 3}}, "jumped 3 times"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_learning_rate_that_is_too_high(changes, evidence):
    found = findings(record(training={"lr": 1.0}, **changes))[0]
    assert found.rule == "lr-too-high" and evidence in found.text
    assert "--lr 0.004 " in found.command and "1" in found.text
    half = findings(record(training={"lr": 4e-3}, **changes))[0]
    assert "--lr 0.001 " in half.command


def test_a_learning_rate_that_is_too_low():
    slow = healthy(train_loss=lambda step: 5.5 - step / 400)
    found = only(record(slow, training={"lr": 1e-5}))
    assert found.rule == "lr-too-low" and "1e-05, where 0.004 suits" in found.text and "0.6" in found.text
    assert "--lr 0.004 " in found.command
    assert (
        rules(record(slow, training={"lr": 2e-3}))
        == []
        == rules(record(slow, training={"lr": 1e-5}, state="running", status={"max_steps": 9999}))
    )


def test_a_low_learning_rate_is_why_a_model_is_worse_than_counting():
    """More of the same steps would not help, even where the loss no longer falls."""
    worse = {"data": {"ngram_bits_per_byte": 1.8}, "training": {"lr": 1e-5}}
    found = only(record(**worse))
    assert found.rule == "lr-too-low" and "worse than a byte 5-gram, a table of" in found.text
    assert "--lr 0.004 " in found.command
    slow = only(record(healthy(train_loss=lambda step: 5.5 - step / 400), **worse))
    assert "still fell by 0.6" in slow.text and "worse than a byte 5-gram" in slow.text
    assert only(record(data={"ngram_bits_per_byte": 1.8}, training={"lr": 2e-3})).rule == "worse-than-ngram"
    high = record(data={"ngram_bits_per_byte": 1.8}, training={"lr": 1.0}, state="diverged")
    assert only(high).rule == "lr-too-high"


def test_waiting_for_data():
    found = only(record(healthy(data_wait_share=lambda step: 0.2 + 0.1 * (step > 700))))
    assert found.rule == "waits-for-data" and "waited for data for 26 % of the time" in found.text
    assert found.command == ("nnx train --model nyx --max-steps 1000 --data FASTER_DISK/words --out weights/words")
    options = "nnx train --filepath a.txt --filepath=b.txt --val-fraction 0.2 --errors strict --lr 1e-3"
    told = only(record(healthy(data_wait_share=lambda step: 0.5), status={"command": options}))
    assert told.command == "nnx train --lr 1e-3 --data FASTER_DISK/words", "a token folder is split and read already"


def test_a_text_that_is_read_too_often():
    found = only(record(data={"train_tokens": 100_000}))
    assert found.rule == "repeated" and "81 times; beyond 16" not in found.text and "81 times; beyond 32" in found.text
    assert found.command == "nnx train --model nyx --filepath my.txt --epochs 32 --out weights/words"


def test_a_model_of_the_wrong_size():
    large = only(record(model={"size": "small", "dim": 512}, parameters=40_000_000, training={"lr": 1e-3}))
    assert large.rule == "size" and "large for so short a run" in large.text and "--size tiny " in large.command
    assert "8.118M tokens for 40M parameters, 0.2 each" in large.text
    small = healthy(tokens=lambda step: step * 100_000)
    small = only(record(small, data={"train_tokens": 90_000_000}))
    assert "small for so much text" in small.text and "--size tiny " in small.command
    lines = healthy()[:60]
    running = {"model": {"size": "small", "dim": 512}, "training": {"lr": 1e-3}, "state": "running"}
    assert findings(record(lines, parameters=25_000_000, **running)) == [], "by its end each sees 0.33"
    assert "8.192M tokens by its end for 40M" in only(record(lines, parameters=40_000_000, **running)).text
    own = record(model={"size": None}, parameters=40_000_000)
    assert findings(own) == [], "there is no next size"


def test_skips_of_fp16_that_go_on():
    run = healthy(skipped_steps=lambda step: step // 20)
    found = only(record(run, training={"precision": "fp16"}))
    assert found.rule == "fp16-skips" and "24 of the steps 501 to 991 were skipped, 49 in all" in found.text
    assert "--precision fp32 " in found.command
    assert findings(record(run, training={"precision": "bf16"})) == []


def test_compiling_that_does_not_pay():
    found = only(record(status={"events": ["resumed", "compiled: a step takes 104% of its time before"]}))
    assert found.rule == "compile" and "104 %" in found.text and "--compile off " in found.command


def test_a_model_that_is_worse_than_counting():
    found = only(record(data={"ngram_bits_per_byte": 1.8}))
    assert found.rule == "worse-than-ngram" and "four bytes: 2.16 bits per byte against 1.80" in found.text
    assert str(found) == f"{found.text}; try:\n  {found.command}"
    assert found.command == "nnx train --resume weights/words --max-time 7m"
    assert findings(record(healthy()[:8], data={"ngram_bits_per_byte": 1.8}, state="running")) == []
    assert rules(record(healthy()[:8], data={"ngram_bits_per_byte": 1.8}, state="interrupted")) != []
    mine = findings(record(data={"ngram_bits_per_byte": 1.8}), " --model mine.py")[0]
    assert mine.command == "nnx train --resume weights/words --model mine.py --max-time 7m"
    again = findings(record(data={"ngram_bits_per_byte": 1.8, "train_tokens": 100_000}))
    assert [each.rule for each in again] == ["worse-than-ngram", "repeated"] and "MORE.txt" in again[0].command
    by_heart = record(healthy(train_loss=memorising, val_loss=turning), data={"ngram_bits_per_byte": 1.8})
    assert "--filepath MORE.txt" in findings(by_heart)[1].command


def test_a_text_that_has_given_what_it_has():
    used_up = {"ended": "data", "max_time_s": 7400}
    found = only(record(status=used_up))
    assert found.rule == "used-up" and "or --size tiny would use the 2 h left" in found.text
    assert "--size tiny " in found.command
    turned = only(record(status=used_up | {"events": ["validation turned: 1.5 at step 3"]}))
    assert "--size" not in turned.text and "--filepath MORE.txt" in turned.command and "my.txt" not in turned.command
    worse = findings(record(status=used_up, data={"ngram_bits_per_byte": 1.8}))
    assert [each.rule for each in worse] == ["used-up", "worse-than-ngram"]
    assert not any("--resume" in each.command for each in worse)


def test_a_larger_size_is_for_a_text_that_is_enough_for_it():
    small = only(record(status={"ended": "data", "max_time_s": 7400}, data={"train_tokens": 150_000}))
    assert "more text would use the 2 h left" in small.text and "--size" not in small.command
    assert "--filepath MORE.txt" in small.command


def test_advice_has_the_length_of_the_run_and_options_that_may_stand_beside_it():
    command = "nnx train --filepath my.txt --max-steps 2 --stop-early off"
    losing = dict(training={"max_steps": None, "max_time": "2h"}, status={"command": command})
    overfits = only(record(healthy(train_loss=memorising, val_loss=turning), **losing))
    assert overfits.command == "nnx train --filepath my.txt --stop-early off --max-time 2h --dropout 0.1"
    read = only(record(data={"train_tokens": 100_000}, **losing))
    assert read.command == "nnx train --filepath my.txt --epochs 32"


def test_a_context_that_is_not_used():
    run = record(model={"seq_len": 256})
    found = unused_context(run, Verdict((193, 256), late=1.52, early=1.5, difference=0.02, stderr=0.004))
    assert found.rule == "unused-context" and "1.520 at positions 193 to 256, 1.500 for" in found.text
    assert "--seq-len 128 " in found.command
    same = Verdict((193, 256), late=1.5, early=1.5, difference=0.001, stderr=0.004)
    assert unused_context(run, same) is not None
    little_text = Verdict((193, 256), late=1.5, early=1.52, difference=-0.02, stderr=0.08)
    used = Verdict((193, 256), late=1.4, early=1.5, difference=-0.1, stderr=0.004)
    assert unused_context(run, little_text) is unused_context(run, used) is None


def test_the_most_important_comes_first():
    run = record(
        healthy(train_loss=memorising, val_loss=turning, skipped_steps=lambda step: step // 20),
        training={"precision": "fp16"},
        data={"train_tokens": 100_000, "ngram_bits_per_byte": 1.8},
        status={"events": ["compiled: a step takes 99% of its time before"]},
    )
    assert rules(run) == ["overfitting", "worse-than-ngram", "fp16-skips", "repeated", "compile"]


@pytest.mark.parametrize("command", [None, 5, "", "nnx train '", "python mine.py", "nnx compare --models nyx,ngpt"])
def test_without_the_command_that_made_it_one_is_made_up(command):
    found = only(record(data={"train_tokens": 100_000}, status={"command": command}))
    assert found.command.startswith("nnx train --model nyx --size nano --data ")
    assert found.command.endswith("data/words --epochs 32")


@pytest.mark.parametrize("value", ["text", [1], {"a": 1}, True, None, -1.0, 0, 1e308, 10**400], ids=str)
def test_numbers_of_no_sense_find_something_or_nothing(value):
    run = record()
    lines = [{name: value if name != "step" else n for name, n in line.items()} for line in run.metrics]
    findings(record(lines))
    for part in ("model", "training", "data"):
        findings(record(**{part: dict.fromkeys(run.config[part], value)}))
        findings(RunRecord("x", Path("x"), run.config | {part: value}, run.status, "finished", run.metrics, [], {}))
    findings(record(status=dict.fromkeys(run.status, value)))
    findings(record(parameters=value))
