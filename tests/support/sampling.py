"""Selects the instants at which a test strikes: all, or every n-th if ``CHECKPOINTER_EVERY`` is n.

CI tries every tenth. The selection changes each day, and the head of the report says how to repeat it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

EVERY = max(1, int(os.environ.get("CHECKPOINTER_EVERY", "1")))
FIRST = int(os.environ.get("CHECKPOINTER_FIRST", time.time() // 86_400)) % EVERY

DAYS = min(EVERY, 3)
"""In so many days CI tries all cases of a kind of which it tries a third each day."""


def instants(stop: int, step: int = 1) -> range:
    """Return the selected numbers from 1 to ``stop`` (exclusive), which are ``step`` apart if all are selected."""
    return range(1 + FIRST * step, stop, EVERY * step) if stop > 1 + FIRST * step else range(1, stop)


def some(count: int) -> int:
    """Return how many of ``count`` random instants are tried."""
    return max(1, count // EVERY)


def third(names: Iterable[T]) -> list[T]:
    """Return every third name if not all instants are selected: others on the next days."""
    return [*names][FIRST % DAYS :: DAYS]


def described() -> str:
    """Return the line about the selection, for the head of the report."""
    if EVERY == 1:
        return "instants: all"
    return f"instants: every {EVERY}th (again with CHECKPOINTER_EVERY={EVERY} CHECKPOINTER_FIRST={FIRST})"
