"""Which size of model a text suits, whatever the machine."""

from __future__ import annotations

from nnx_cli.planning.recipe import table


def suited_size(train_bytes: float) -> str:
    """The largest named size that so much training text is enough for; not raced beyond `base`."""
    return max((least, size) for least, size in table.SIZES_BY_BYTES if train_bytes >= least)[1]
