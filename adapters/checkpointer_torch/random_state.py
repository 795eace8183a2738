"""The state of every random generator that a training draws from by default, as plain data."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from checkpointer import CheckpointerWarning

__all__ = ["as_numpy", "as_plain", "put_random_state", "take_random_state"]


def take_random_state() -> dict[str, Any]:
    """Return the state of python's, numpy's (if imported), torch's and every CUDA device's generator.

    Example:
        >>> state = take_random_state()
        >>> drawn = torch.rand(1)
        >>> put_random_state(state)
        >>> bool(drawn == torch.rand(1))
        True
    """
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss],
        "torch": torch.get_rng_state(),
    }
    if "numpy" in sys.modules:
        import numpy as np

        state["numpy"] = as_plain(np.random.get_state(legacy=False))
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def put_random_state(state: Mapping[str, Any]) -> None:
    """Go on with the random numbers from where `take_random_state` was called."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        try:
            import numpy as np
        except ImportError:
            pass
        else:
            np.random.set_state(as_numpy(state["numpy"]))
    devices = state.get("cuda", [])
    here = torch.cuda.device_count() if devices else 0
    if len(devices) > here:
        msg = f"the checkpoint has random states of {len(devices)} CUDA devices, and {here} are here: not exact"
        warnings.warn(msg, CheckpointerWarning, stacklevel=2)
    for device, of_device in enumerate(devices[:here]):
        torch.cuda.set_rng_state(of_device, device)


def as_plain(value: Any) -> Any:
    """Return what numpy keeps of a generator without numpy's own types, which a safe load refuses."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if not hasattr(value, "tolist"):
        return value
    return {"dtype": str(value.dtype), "values": value.tolist()} if value.ndim else value.item()


def as_numpy(value: Any) -> Any:
    """Return what `as_plain` was given."""
    if not isinstance(value, dict):
        return value
    if set(value) != {"dtype", "values"}:
        return {key: as_numpy(item) for key, item in value.items()}
    import numpy as np

    return np.array(value["values"], dtype=value["dtype"])
