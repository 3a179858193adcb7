"""Makes `tests.reliability` importable however pytest was started, also in the processes that the tests start."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
