"""How far a training has come."""

from __future__ import annotations

import attrs

__all__ = ["Progress"]


@attrs.frozen(kw_only=True)
class Progress:
    """Where the loop is: at a boundary between two steps."""

    epoch: int = 0
    """0-based index of the epoch in progress, or of the next one."""
    step: int = 0
    """Finished steps."""
    batch: int = 0
    """Batches of this epoch that those steps have used."""
    source: str = ""
    """The checkpoint this was resumed from; empty at the start of a training."""
