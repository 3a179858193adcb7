"""Which tokenizer `auto` takes, and how many ids `bpe` has: by the text, and by the model where it is known."""

from __future__ import annotations

from nnx_cli.planning.recipe import table


def vocabularies_for(n_parameters: int | None = None) -> tuple[tuple[int, int], ...]:
    """(bytes of text, ids): from so much text on `bpe` has so many ids, for a model of so many parameters or any.

    With less text than the first `auto` is bytes.
    """
    least_text = bpe_from(n_parameters)
    most = max(ids for least, ids in table.IDS_BY_PARAMETERS if n_parameters is None or n_parameters >= least)
    return tuple((max(n_bytes, least_text), ids) for n_bytes, ids in table.IDS_BY_BYTES if ids <= most)


def bpe_from(n_parameters: int | None) -> int:
    """Bytes of text from which on `auto` is bpe, for a model of so many parameters or any."""
    return table.BPE_FROM_BYTES if n_parameters is None or n_parameters > table.SMALL else table.BPE_FROM_BYTES_SMALL
