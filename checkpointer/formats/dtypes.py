"""Whether numbers of one type fit into another: torch itself converts them silently."""

from __future__ import annotations

import torch


def holds(here: torch.dtype, there: torch.dtype) -> bool:
    """Return whether ``here`` is the wider type, or the same: else 300 as an int64 becomes 44 as an int8.

    Example:
        >>> holds(torch.float32, torch.bfloat16), holds(torch.bfloat16, torch.float32)
        (True, False)
    """
    try:
        return here == there or torch.promote_types(here, there) == here
    except RuntimeError:  # Eight-bit floats are not promoted.
        return False
