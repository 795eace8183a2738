"""How many of the instants at which a test could strike are tried: all, or every n-th if ``CHECKPOINTER_EVERY`` says n.

CI tries every tenth: which ones changes from day to day, and the report's head says how to try the same again.
"""

from __future__ import annotations

import os
import time

EVERY = max(1, int(os.environ.get("CHECKPOINTER_EVERY", "1")))
FIRST = int(os.environ.get("CHECKPOINTER_FIRST", time.time() // 86_400)) % EVERY


def instants(stop: int, step: int = 1) -> range:
    """Return the numbers from 1 up to, not including, ``stop`` that are to be tried; ``step`` apart if all are."""
    return range(1 + FIRST * step, stop, EVERY * step) if stop > 1 + FIRST * step else range(1, stop)


def some(count: int) -> int:
    """Return how many of so many random instants are tried."""
    return max(1, count // EVERY)


def described() -> str:
    """Say which instants are tried, for the head of the report."""
    if EVERY == 1:
        return "instants: all"
    return f"instants: every {EVERY}th (again with CHECKPOINTER_EVERY={EVERY} CHECKPOINTER_FIRST={FIRST})"
