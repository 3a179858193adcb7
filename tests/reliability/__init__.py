"""What a run survives, tested on real processes and real files.

pytest runs the short version of every part. `python -m tests.reliability --full` runs the long ones: every file
`test_*.py` here that has a table `PARTS = {name: function(full) -> Result}` takes part. A function raises
AssertionError where a promise is broken.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Result:
    """What a part tried: the number of the promise in promises.md, what was done, how often, and what came out."""

    promise: int
    tried: str
    times: int
    passed: int
    notes: list[str] = field(default_factory=list)
