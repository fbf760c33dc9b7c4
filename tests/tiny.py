"""bench/tiny_models.py and what is measured on its models, for tests."""

import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
from most_used import kl_of, lossless  # noqa: E402
from sweep import outcome, page  # noqa: E402
from tiny_models import build, randomise  # noqa: E402

sys.path.remove(str(BENCH))
__all__ = ["BENCH", "build", "kl_of", "lossless", "outcome", "page", "randomise"]
