"""Texts on a terminal."""

import pytest
from console.hostile import HOSTILE

from nnx_cli.console.cells import fitting, plain_line, wrapped


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


def test_what_does_not_fit_as_a_whole_is_left_out():
    assert fitting(["40 %", "a long remark", "9 s left"], 15) == "40 %  9 s left"
    assert fitting(["小猫", "b"], 4) == "小猫" and fitting(["abc"], 2) == "" == fitting([], 9)
