"""Which size of model a text suits, whatever the machine.

Here and not in the plan, which needs torch: preparing a text does not.
"""

from __future__ import annotations

FEW_TOKENS = 0.25  # that a parameter sees, below which a smaller size learns more in the time: tests/bench/horizon.md
PARAMETERS_PER_BYTE = 12  # of training text, up to which a larger size was better: tests/bench/horizon.md, of `tiny`
# bytes of training text from which on each size has no more than that
SIZES_BY_BYTES = (
    (0, "nano"),
    (890_000, "tiny"),
    (2_500_000, "small"),
    (10_300_000, "base"),
    (29_000_000, "large"),
    (83_000_000, "xl"),
)


def suited_size(train_bytes: float) -> str:
    """The largest named size that so much training text is enough for; not raced beyond `small`."""
    return max((least, size) for least, size in SIZES_BY_BYTES if train_bytes >= least)[1]
