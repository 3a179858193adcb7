"""Axes: how numbers are written on them, and in which units."""

import pytest

from nnx_cli.reporting.scales import short, spans, time_unit


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (1500, "1,500"),
        (12_000, "12k"),
        (2.5e6, "2.5M"),
        (3e9, "3B"),
        (3e15, "3e15"),
        (1e-4, "1e-4"),
    ],
)
def test_numbers_have_room_on_an_axis(value, text):
    assert short(value) == text


def test_units_follow_what_is_measured():
    assert time_unit(100) == ("seconds", 1) and time_unit(600) == ("minutes", 60) and time_unit(1e6)[0] == "days"
    assert spans([1, 0, -5, 100], 40) and not spans([1, 3], 3) and not spans([], 2)
