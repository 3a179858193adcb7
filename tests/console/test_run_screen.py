"""The block of a training run, for screens of every size."""

import pytest
from rich.cells import cell_len

from nnx_cli.console.run_screen import RunFacts, RunScreen, plain_line, wrapped

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07\x9b31m\x00\x7f",
    "\u202eevil\u202c \u2066isolate\u2069 \u200fmark",
    "e" + "\u0301" * 5000,
    "👩‍👩‍👧‍👦" * 400 + "🏳️‍🌈🇩🇪❤️",
    "小猫" * 3000,
    "x" * 100_000,
    "\r\n\t\v\f\x1c\u2028\u2029\x85" * 50,
    "\ud800\udfff\ufeff\u00ad\ufffe",
    "\u1100" * 50 + "\u1161" * 200,
    "a\u200b" * 900,
]


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


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_every_character_has_a_place(text):
    """No pile of marks, nothing that joins, so that terminals agree about the width."""
    line = plain_line(text)
    assert line.count("\u0301") <= 2 and not set(line) & set("\u200b\u200d\ufe0f\n\r\t\ufffe")
    assert len(line) <= 6 * len(text)


def test_words_are_kept_whole_where_they_fit():
    assert wrapped("one two three four", 9, 5) == ["one two", "three", "four"]
    assert wrapped("one two three four", 9, 2) == ["one two", "three…"]
    assert wrapped("abcdefghij", 4, 5) == ["abcd", "efgh", "ij"]
    assert wrapped("小猫小猫小", 5, 5) == ["小猫", "小猫", "小"]
    assert wrapped("", 5, 5) == [] and wrapped("小", 1, 3) == ["小"]


@pytest.mark.parametrize("bits", [None, 2.3])
def test_what_is_not_known_is_not_shown(bits):
    text = "\n".join(shown(screen(ngram_bits_per_byte=bits).layout(100, 40)))
    assert ("n-gram model 2.30 bits/byte" in text) == (bits is not None) == ("┄" in text)
    assert "MFU" not in text and "3 skipped" in text and "1.00 GiB of 7.00 GiB" in text


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
