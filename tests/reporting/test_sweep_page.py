import re

from nnx_cli.reporting.sweep_page import sweep_page


def a_trial(number, lr, optimizer, bits, **facts):
    return {
        "number": number,
        "trial": f"{number:03d}",
        "settings": {"lr": lr, "optimizer": optimizer},
        "status": "finished" if bits else "diverged",
        "problem": None if bits else "the loss went wrong",
        "rungs_reached": [bits] if bits else [],
        "bits_per_byte": bits,
        "steps": 100,
        "time_s": 5.0,
        "command": f"nnx train --lr {lr}",
    } | facts


def a_sweep(**facts):
    return {
        "state": "finished",
        "sampler": "random",
        "settings": {"model": "nyx"},
        "length": {"max_steps": 100},
        "searched": {
            "lr": {"low": 1e-4, "high": 1e-2, "log": True, "step": None},
            "optimizer": {"values": ["adamw", "muon"]},
        },
        "trials": [a_trial(2, 1e-3, "muon", 1.5), a_trial(1, 1e-4, "adamw", 2.0), a_trial(3, 1e-2, "muon", None)],
    } | facts


def test_the_page_of_a_sweep():
    shown = sweep_page(a_sweep())
    assert "002 is the best of 3 trials, 1.5000 bits per byte, with lr 0.001, optimizer muon." in shown
    by_lr = shown[shown.index("Bits per byte by lr") :].partition("</figure>")[0]
    assert "logarithmic" in by_lr and by_lr.count('class="mark') == 2 and "class=ring" in by_lr
    assert 'class="line' not in by_lr  # nothing joins trials
    by_optimizer = shown[shown.index("Bits per byte by optimizer") :].partition("</figure>")[0]
    assert "optimizer muon" in by_optimizer and by_optimizer.count('class="mark') == 2
    assert "003: the loss went wrong" in shown and "not finished" not in shown
    assert "<script" not in shown and not re.search(r'(src|href)="http', shown)


def test_a_page_of_halving_keeps_rungs_apart():
    trials = [
        a_trial(1, 1e-3, "muon", 1.5, rungs_reached=[2.5, 1.5]),
        a_trial(2, 2e-3, "muon", 1.4, status="stopped"),
        a_trial(3, 3e-3, "adamw", 1.9, status="stopped"),
    ]
    shown = sweep_page(a_sweep(trials=trials, state="running"))
    assert "001 is the best of 3 trials," in shown and "not finished" in shown
    by_lr = shown[shown.index("Bits per byte by lr") :].partition("</figure>")[0]
    assert by_lr.partition("</ul>")[2].count('class="mark') == 4
    assert "whole length" in by_lr and "rung 1" in by_lr and by_lr.count("<circle") == 2  # one in the legend


def test_what_is_searched_is_not_said_to_be_the_same_for_all():
    searched = {"model": {"values": ["nyx", "llama"]}}
    shown = sweep_page(a_sweep(searched=searched, settings={"model": "nyx", "size": "nano"}))
    assert "values nyx, llama" in shown and ">nano<" in shown
    assert ">nyx<" not in shown[shown.index("The same for all trials") :]


def test_a_page_of_little_or_nonsense():
    assert "No trial has a result yet" in sweep_page(a_sweep(trials=[]))
    assert "No trial has a result yet" in sweep_page({})
    hostile = a_trial(1, 1e-3, "<script>", 1.5, command="<img>", steps="x", rungs_reached="y", time_s=[])
    shown = sweep_page(a_sweep(trials=[hostile, "no trial", {}], searched={"<b>": 3, "lr": [], "optimizer": None}))
    assert "<script>" not in shown and "<img>" not in shown and "<b>" not in shown
