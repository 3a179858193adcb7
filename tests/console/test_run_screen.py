"""The block of a training run, for screens of every size."""

import pytest
from console.hostile import HOSTILE
from rich.cells import cell_len

from nnx_cli.console.run_screen import NOISE, UNIT, RunFacts, RunScreen, titled_sample


def screen(n_steps=40, sample="", **facts):
    made = RunScreen(RunFacts("nyx nano", n_steps, 7 << 30, **facts))
    for step in range(1, n_steps + 1):
        val = 1.0 + 3.0 / step if step % 4 == 0 else None
        made.step(
            {
                "step": step,
                "train_loss": 1.0 + 3.0 / step,
                "val_loss": val,
                "val_bits_per_byte": val and 2 * val,
                "lr": 1e-3,
                "grad_norm": 0.5,
                "tokens_per_s": 1e4,
                "peak_memory_bytes": 1 << 30,
                "skipped_steps": 3,
                "mfu": None,
            },
            step / n_steps,
        )
    made.sample = n_steps, sample
    return made


def shown(lines):
    return ["".join(text for text, _ in line) for line in lines]


@pytest.mark.parametrize("sample", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("size", [(40, 12), (80, 24), (200, 60), (20, 5), (1, 1), (500, 200), (41, 200), (300, 12)])
def test_every_line_fits(size, sample):
    lines = shown(screen(sample=sample, ngram_bits_per_byte=2.3).layout(*size))
    assert 1 <= len(lines) <= max(1, size[1] * 2 // 3)
    assert all(cell_len(line) <= size[0] for line in lines)
    assert not any(char in line for line in lines for char in "\x1b\x07\x9b\x00\n\r\t\u202e\u2066\u200d\ud800")


@pytest.mark.parametrize("bits", [None, 2.3])
def test_what_is_not_known_is_not_shown(bits):
    text = "\n".join(shown(screen(ngram_bits_per_byte=bits).layout(100, 40)))
    assert ("n-gram model 1.1500 (2.300 bits/byte)" in text) == (bits is not None) == ("┄" in text)
    assert "MFU" not in text and "3 skipped" in text and "1.00 GiB of 7.00 GiB" in text


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_scale_names_its_unit(columns):
    (axis,) = (line for line in shown(screen().layout(columns, 30)) if UNIT in line)
    assert axis.split() == ["1", *UNIT.split(), "step", "40"] and "nats a token" in axis


NOISY = {
    "bytes": bytes(range(256)).decode("utf-8", "replace"),
    "half of a letter": "ein Bär und " + "\ufffd" * 3,
    "controls": "\x0e\x02 th\x7f e\x1b " * 40,
}
TEXTS = {
    "words": "To be, or not to be\n" * 20,
    "lines of another system": "Romeo\r\n" * 50,
    "Chinese": "小猫坐在" * 50,
    "emoji": "👩‍👩‍👧‍👦 " * 9,
    "nothing": "",
    "one bad byte": "Le café est froid" + "\ufffd",
}


@pytest.mark.parametrize("text", NOISY.values(), ids=NOISY)
def test_noise_is_named_and_cut(text):
    title, rest = titled_sample(3, text)
    assert title == f"sample at step 3 ({NOISE})" and rest and len(rest) <= 121 and "\n" not in rest
    assert any(NOISE in line for line in shown(screen(sample=text).layout(80, 24)))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_is_no_noise(text):
    assert titled_sample(1200, text) == ("sample at step 1,200", text)


def test_a_run_that_goes_back_forgets_what_came_after():
    made = screen(40)
    made.step(made.record | {"step": 21, "train_loss": 2.0, "val_loss": None}, 0.5)
    assert [x for x, _ in made.train.all()] == [*range(1, 22), 21] and max(x for x, _ in made.val.all()) == 20
    assert made.layout(80, 24)


def test_before_the_first_step_it_is_starting():
    made = RunScreen(RunFacts("nyx nano"))
    assert shown(made.layout(20, 5)) == ["starting  nyx nano"]
    assert len(made.layout(80, 24)) == 2 and shown(made.layout(80, 24))[1].endswith("starting")


def test_it_moves_between_logged_steps():
    made = screen(40)
    before = shown(made.layout(80, 24))
    made.move(0.25)
    after = shown(made.layout(80, 24))
    assert before[1].startswith("100.0 % ━") and after[1].startswith(" 25.0 % ━") and before[2:] == after[2:]


def test_a_run_that_goes_on_has_its_whole_curve():
    before = [
        {"step": 10, "train_loss": 3.0, "val_loss": 2.5, "val_bits_per_byte": 3.6},
        {"step": 20, "train_loss": 2.0, "val_loss": None},
        {"step": 30, "train_loss": None, "val_loss": 2.75, "val_bits_per_byte": "x"},
        {"step": 40, "train_loss": "two", "val_loss": [1], "val_bits_per_byte": 1},
        {"step": 50, "train_loss": 1e999, "val_loss": True},
        {"no": "step"},
    ]
    made = RunScreen(RunFacts("nyx", 100))
    made.remember(before)
    assert made.layout(80, 24)  # before the first step, too
    assert made.train.all() == [(10, 3.0), (20, 2.0)] and made.val.all() == [(10, 2.5), (30, 2.75)]
    later = dict(lr=1e-3, grad_norm=1.0, tokens_per_s=1.0, peak_memory_bytes=None, skipped_steps=0)
    made.step({"step": 60, "train_loss": 1.5, "val_loss": 2.6, "val_bits_per_byte": None, **later}, 0.6)
    lines = shown(made.layout(80, 24))
    assert any("best 2.5000 (3.600 bits/byte), step 10" in line for line in lines)
    assert any(line.split()[0] == "10" and line.endswith("step 60") for line in lines if line)
    made.remember([])


def test_a_run_that_goes_on_without_a_log_begins_there():
    made = RunScreen(RunFacts("nyx", 100))
    made.remember([])
    assert "starting" in "".join(shown(made.layout(80, 24)))
