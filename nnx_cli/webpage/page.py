"""A page that writes with a model and shows how likely each token was: in a file that holds the model, or of a server.

It is filled from page.html, page.css, page.js (what it shows) and tokenizer.js beside this module, and from the script
of whoever computes: that has `class Model`, whose `open(text)` makes one of the page's data. page.js says what it has.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import string
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from nnx_cli import __version__
from nnx_cli.data.conversations import ASSISTANT, USER, template_of
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.data.tokenizers.bpe import BpeTokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.errors import CheckpointError
from nnx_cli.models import stem
from nnx_cli.runs.card import Card, make_card
from nnx_cli.runs.load import ModelRef, architecture_of, model_from_config
from nnx_cli.system.files import read_json
from nnx_cli.system.text import printable, well_formed

MEASURED = "bits per byte"
FACTS = {
    "architecture": "architecture",
    "parameters": "parameters",
    MEASURED: "bits per byte of validation text",
    "data": "data",
    "trained on, tokens": "tokens",
}  # by their names on the card, what comes first on the page
WORDS = {  # of a page: with a model that goes on with a text, and with one that answers
    False: {"kind": "text", "does": "goes on with a text", "asked": "Your text", "write": "Write", "prompt": "Once"}
    | {"written": "What it writes", "role": "group", "hidden": "hidden", "rows": "3"},
    True: {"kind": "chat", "does": "answers", "asked": "Your message", "write": "Send", "prompt": ""}
    | {"written": "The conversation", "role": "log", "hidden": "", "rows": "2"},
}


@dataclass(frozen=True)
class About:
    """What a page says of its model: facts by their names, and sentences on what its weights went through."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    changes: Sequence[str] = ()

    @classmethod
    def of_model(cls, ref: ModelRef) -> About:
        """As a MODEL is stored, and with its name. Raises CheckpointError."""
        config = ref.config
        name, model = architecture_of(config, ref.folder, ref.file), model_from_config(config, ref.folder, ref.file)
        n_parameters = sum(tensor.numel() for tensor in model.state_without_ties().values())
        card = make_card(ref, stem(name), model.config, n_parameters, None)
        about = cls.of(card, ref, (config.get("quantization") or {}).get("bits"))
        return replace(about, facts={"name": ref.folder.resolve().name} | about.facts)

    @classmethod
    def of(cls, card: Card, ref: ModelRef, bits: int | None) -> About:
        """From the card of a model whose weights have so many bits; None: they are no codes."""
        known, stored = dict(card.size + card.training), (ref.config.get("quantization") or {}).get("bits")
        facts = {what: known[key] for what, key in FACTS.items() if key in known}
        if bits is not None and MEASURED in facts:
            facts = {f"{what}, before rounding" if what == MEASURED else what: value for what, value in facts.items()}
        if bits is not None and bits == stored:
            with suppress(
                CheckpointError, KeyError, TypeError, ValueError
            ):  # no `nnx quantize` wrote it, or an older one
                facts[MEASURED] = f"{read_json(ref.folder / 'receipt.json')['after']['bits_per_byte']:.4g}"
        if bits is not None:
            facts["weights"] = f"int{bits}"
        return cls(card.title, facts | {w: v for w, v in card.size if w not in FACTS.values()}, card.changes)


@dataclass(frozen=True)
class Page:
    """A page, and its content security policy, which allows its own scripts and style sheet alone."""

    text: str
    policy: str


def fill_page(
    about: About, tokenizer: Tokenizer | None, backend: str, data: str, *, where: str, most: int, connects: bool = False
) -> Page:
    """The whole page. `data` is what the script `backend` opens, `where` a sentence on where the model runs, `most` how
    many tokens may be asked for; `connects`: the script asks the server that the page came from."""
    style, tokens, page = (file_text(f"{name}") for name in ("page.css", "tokenizer.js", "page.js"))
    scripts = " ".join(f"'{_digest(script)}'" for script in (tokens, backend, page))
    policy = f"default-src 'none'; script-src {scripts}; style-src '{_digest(style)}'; "
    policy += "connect-src 'self'; " * connects + "base-uri 'none'; form-action 'none'"
    words = WORDS[template_of(tokenizer) is not None]
    text = string.Template(file_text("page.html")).substitute(
        words | {"prompt": words["prompt"] if tokenizer is not None else ""},
        policy=policy,
        version=_text(__version__),
        title=_text(about.title),
        where=where,
        most=most,
        count=min(most, 200),
        style=style,
        facts="".join(f"<div><dt>{_text(w)}</dt><dd>{_text(v)}</dd></div>" for w, v in about.facts.items()),
        changes="".join(f"<p>{_text(sentence)}</p>" for sentence in about.changes),
        date=datetime.now(UTC).date().isoformat(),
        data=data.replace("<", r"\u003c"),  # in JSON
        tokenizer=tokens,
        backend=backend,
        page=page,
    )
    return Page(text, policy)


def describe_tokenizer(tokenizer: Tokenizer | None, start_ids: Sequence[int]) -> dict[str, Any]:
    """What tokenizer.js makes a tokenizer of; without one, texts are ids. `start_ids` are what a text begins with."""
    if tokenizer is None:
        return {"kind": "ids", "starts": start_ids, "ends": []}
    template = template_of(tokenizer)
    ends = [tokenizer.eot_id] if template is None else template.ids
    more: dict[str, Any] = {"kind": "byte"}
    if isinstance(tokenizer, BpeTokenizer):
        tokens = [token.decode("latin-1") for token in tokenizer.tokens]
        more = {"kind": "bpe", "pattern": browser_pattern(tokenizer.pattern), "tokens": tokens}
    elif isinstance(tokenizer, CharTokenizer):
        more = {"kind": "char", "characters": "".join(tokenizer.characters)}
    if template is not None:
        roles = {role: template.role_ids[role] for role in (USER, ASSISTANT)}
        more["template"] = {"begin": template.begin_id, "end": template.end_id} | roles
    return more | {"starts": start_ids, "ends": sorted(i for i in ends if i is not None)}


def browser_pattern(pattern: str) -> str:
    r"""A regular expression as JavaScript reads it, with the flag u: there \s, \d and \w are others, and \z is $."""
    classes = {"s": r"\p{White_Space}", "S": r"\P{White_Space}", "d": r"\p{Nd}", "D": r"\P{Nd}", "z": "$"}
    return re.sub(r"\\(.)", lambda found: classes.get(found[1], found[0]), pattern, flags=re.DOTALL)


def file_text(name: str) -> str:
    """A file beside this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _text(value: str) -> str:
    """Text as HTML shows it, letter by letter."""
    return html.escape(printable(well_formed(value)))


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
