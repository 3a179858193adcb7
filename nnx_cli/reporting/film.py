"""Matrices one after the other as an animated SVG: a strip of pictures that the style sheet moves behind a window.

No script is needed. It stands still, at its end, in print and for those who asked their system for less motion, and
whenever the box below is ticked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from nnx_cli.reporting.figures import N_COLOURS, figure, words
from nnx_cli.reporting.heat_maps import (
    CHOICE_SHADE,
    N_SHADES,
    Layout,
    Matrix,
    cells,
    legend,
    scale_words,
    scrolled,
    told,
)

PLACES, HELD = 24, 4  # pictures of the strip, as the style sheet counts them, and how many of them are the last one
LABEL_WIDTH, LABEL_HEIGHT = 110, 22  # of the words below a picture


def film(title: str, about: str, pictures: Sequence[tuple[str, Matrix]]) -> str:
    """A figure of matrices of the same rows and columns, each under a name, that follow each other in a loop."""
    most = max(matrix.most for _, matrix in pictures)
    shown = [(name, replace(matrix, full=most)) for name, matrix in pictures]
    last = shown[-1][1]
    layout = Layout(last)
    width, height = max(layout.width, LABEL_WIDTH), layout.height + LABEL_HEIGHT
    key = "f" + hashlib.sha256(f"{title}{shown}".encode(errors="backslashreplace")).hexdigest()[:10]
    strip: list[str] = []
    first: dict[int, int] = {}
    for place, number in enumerate(_order(len(shown))):
        if number in first:
            strip.append(f'<use href="#{key}-{number}" x="{(place - first[number]) * width}"/>')
            continue
        first[number] = place
        name, matrix = shown[number]
        ground = f'<rect class=ground width="{width}" height="{height}"/>'
        drawn = cells(matrix, f'width="{layout.width}" height="{layout.height}"')
        label = words("label", f'x="2" y="{height - 6}"', name)
        strip.append(f'<g id="{key}-{number}" transform="translate({place * width})">{ground}{drawn}{label}</g>')
    window = f'x="{layout.left}" y="{layout.above}" width="{width}" height="{height}"'
    parts = [f"<svg {window}><g class=strip>{''.join(strip)}</g></svg>", *layout.names()]
    description = f"{len(shown)} pictures, from {shown[0][0]} to {shown[-1][0]}. The last: {told(last)}"
    picture = scrolled(title, description, parts, layout.left + width + 8, layout.above + height + 4)
    hold = f'<input class=hold type=checkbox id="{key}"><label for="{key}">Hold still</label>'
    colours = scale_words(last) or _choices([matrix for _, matrix in shown])
    return figure(title, about, colours, f"<div>{hold}{picture}</div>", is_wide=True)


def _order(n: int) -> list[int]:
    """Which of `n` pictures stands at each place of the strip: each as often as the others, and then the last."""
    moving = PLACES - HELD
    return [place * n // moving for place in range(moving)] + [n - 1] * HELD


def _choices(matrices: Sequence[Matrix]) -> str:
    """The colours of what is chosen anywhere."""
    chosen = sorted({int(value) for matrix in matrices for row in matrix.values for value in row if value is not None})
    shade = [CHOICE_SHADE / N_SHADES]
    if len(chosen) <= N_COLOURS:
        return legend((f"c{number % N_COLOURS}", shade, str(number)) for number in chosen)
    return legend([(f"c{chosen[0] % N_COLOURS}", shade, f"a colour a number; every {N_COLOURS}th has the same")])
