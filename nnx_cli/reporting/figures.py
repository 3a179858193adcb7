"""What the figures of a page have in common: caption, colours, words in a picture, and its numbers below it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from nnx_cli.reporting.page import table, text

N_COLOURS = 8  # of the style sheet; as many shapes of markers, and dashes from the ninth line on
NOTHING = "Nothing to draw: no such number was recorded."


def caption(title: str, about: str) -> str:
    """What stands above a figure: its title, and what it shows."""
    return f"<figcaption><h3>{text(title)}</h3><p>{text(about)}</p></figcaption>"


def words(kind: str, where: str, written: str) -> str:
    """Words at a place of a picture, of a class of the style sheet."""
    return f'<text class="{kind}" {where}>{text(written)}</text>'


def picture(title: str, told: str, parts: Sequence[str], attributes: str) -> str:
    """A picture that has a title and a description for those who cannot see it."""
    label = hashlib.sha256(f"{title}{told}{parts}".encode(errors="backslashreplace")).hexdigest()[:10]
    return (
        f'<svg role="img" aria-labelledby="t{label} d{label}" {attributes}>'
        f'<title id="t{label}">{text(title)}</title><desc id="d{label}">{text(told)}</desc>{"".join(parts)}</svg>'
    )


def figure(title: str, about: str, *parts: str, is_wide: bool = False) -> str:
    """A figure of parts, one below the other; what is empty is left out."""
    kind = " class=wide" if is_wide else ""
    return f"<figure{kind}>\n" + "\n".join(part for part in (caption(title, about), *parts) if part) + "\n</figure>"


def empty_figure(title: str, about: str) -> str:
    """A figure that there is nothing for."""
    return figure(title, about, f"<p class=empty>{NOTHING}</p>")


def numbers(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The numbers of a figure as a table, behind a line that opens by mouse or key."""
    return f"<details><summary>The numbers</summary>{table(columns, rows, f'Numbers of the chart: {title}')}</details>"
