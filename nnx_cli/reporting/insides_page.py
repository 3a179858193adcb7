"""What a model does inside with a text, as a page: attention maps of every head, and what its architecture adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nnx_cli.errors import counted
from nnx_cli.reporting.heat_maps import Matrix, heat_map
from nnx_cli.reporting.insides_figures import MOST_ROWS, MOST_TOKENS, attention_maps, bare, cut_words, panel_figure
from nnx_cli.reporting.learning import learning_section
from nnx_cli.reporting.page import charts, page, paragraph, section, text

if TYPE_CHECKING:
    from nnx_cli.layers.insides import Insides
    from nnx_cli.runs.snapshots import Snapshot

MOST_CHARS = 3000  # of the prompt
MOST_MAP_CELLS = 75_000  # of all attention maps together: about 750 kB
LAST = (
    "What the last token of the text reads: a row is a head, and the darker a token, the more of the head's attention "
    "it gets. Normal: heads that differ; early in training all look at everything alike, and the "
    "picture is pale; later each looks at a few tokens."
)


def insides_page(
    subject: str, prompt: str, tokens: Sequence[str], insides: Insides, snapshots: Sequence[Snapshot] = ()
) -> str:
    """The page of a prompt, as far as the model saw it; `tokens` are its tokens as code would write them. `snapshots`
    are what its run kept as it learned."""
    return page(
        f"Inside {subject}",
        [
            paragraph(f"What {subject} attends to, gates and selects in {counted(len(tokens), 'token')}.", "lead"),
            section("The text", f"<pre>{text(prompt[-MOST_CHARS:])}</pre>", cut_words(len(tokens), MOST_TOKENS)),
            section("The last token", *_last(tokens, insides)),
            section("Inside the architecture", charts(*(panel_figure(panel, tokens) for panel in insides.panels))),
            section("Attention maps", *attention_maps(tokens, insides, MOST_MAP_CELLS)),
            learning_section(snapshots),
        ],
    )


def _last(tokens: Sequence[str], insides: Insides) -> Iterator[str]:
    """What each head reads for the last token."""
    shown = slice(max(0, len(tokens) - MOST_TOKENS), None)
    rows = [
        (f"{name}, head {head}", values)
        for name, weights in zip(insides.layers, insides.attention, strict=True)
        for head, values in enumerate(weights[:, -1, shown].tolist(), start=1)
    ]
    step = -(-len(rows) // MOST_ROWS)
    picked = rows[::step]
    if step > 1:
        yield paragraph(f"One head in {step} of {len(rows):,} is shown.")
    kind = "signed" if any(value < 0 for _, values in picked for value in values) else "share"
    names, columns = [name for name, _ in picked], bare(tokens[shown])
    matrix = Matrix(names, columns, [values for _, values in picked], kind, full=1, root=True, latest=True)
    yield charts(heat_map(f"What {tokens[-1]} reads", LAST, matrix))
