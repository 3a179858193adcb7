"""A page in one file: the template and the style sheet beside this module, filled with sections of escaped text."""

from __future__ import annotations

import base64
import hashlib
import html
import string
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from nnx_cli import __version__
from nnx_cli.system.files import replace_file
from nnx_cli.system.text import printable, well_formed

BEGINNING = '<!doctype html>\n<html lang="en" data-by="nnx">'  # of every page of ours


def text(value: Any) -> str:
    """Text from anywhere as HTML shows it, letter by letter: markup, control characters and changes of the reading
    direction do nothing."""
    return html.escape(printable(well_formed(str(value))))


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page of `sections`, which are HTML; empty ones are left out.

    Its content security policy allows its own style sheet and nothing else: no script, no request.
    """
    style = _file("page.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return string.Template(_file("page.html")).substitute(
        title=text(title),
        version=text(__version__),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=style,
        body="\n".join(section for section in sections if section),
    )


def write_page(path: Path, whole: str) -> None:
    """Replace a page in one step. Raises OutputError; then the old one stands."""
    replace_file(path, whole.encode())


def section(title: str, *parts: str) -> str:
    """A section with a heading; nothing where it would be empty."""
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{text(title)}</h2>\n{inner}\n</section>" if inner else ""


def charts(*figures: str) -> str:
    """Figures, side by side where there is room."""
    return "<div class=charts>\n" + "\n".join(figures) + "\n</div>"


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is a class of the style sheet."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str, kind: str = "") -> str:
    """A table that can be scrolled, also by keyboard. The first cell of a row is its heading; None is a dash."""
    head = "".join(f"<th scope=col>{text(column)}</th>" for column in columns)
    body = []
    for first, *rest in rows:
        body.append(f"<tr><th scope=row>{text(first)}</th>{''.join(map(_cell, rest))}</tr>")
    label = text(caption)
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<caption><span>{label}</span></caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    """A cell of a table, whose words may stand in several lines; a number with its unit never does."""
    if value is None:
        return "<td>–</td>"
    kind = " class=said" if str(value)[:1].isalpha() else ""
    return f"<td{kind}>{text(value)}</td>"


def facts(values: Mapping[str, Any]) -> str:
    """Names and what they are, as a list; what is None is left out."""
    rows = (f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in values.items() if v is not None)
    return f"<dl class=facts>{''.join(rows)}</dl>"


def sample(title: str, prompt: str, continuation: str, is_open: bool = True) -> str:
    """Generated text under a line that opens and closes it; what it was given to go on with stands out."""
    given = f"<mark>{text(prompt)}</mark>" if prompt.strip() else text(prompt)
    state = " open" if is_open else ""
    return (
        f"<details class=sample{state}><summary>{text(title)}</summary><pre>{given}{text(continuation)}</pre></details>"
    )


@cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
