"""The doubles of ``tests/training``, for the tests and processes of this folder."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training")]

from training_doubles import STEPS, Run  # noqa: E402

__all__ = ["ROOT", "STEPS", "Run"]
