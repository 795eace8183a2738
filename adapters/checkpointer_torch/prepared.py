"""The optimizers that Fabric and accelerate prepare: the optimizer within, its scaler, and whether it has stepped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from checkpointer.errors import PolicyError


def unwrapped(thing: Any) -> Any:
    """Return the optimizer that Fabric or accelerate has wrapped; anything else as it is."""
    if isinstance(thing, torch.optim.Optimizer) and _is_of(thing, "accelerate", "lightning", "lightning_fabric"):
        return unwrapped(thing.optimizer)  # type: ignore[attr-defined]
    return thing


def check_scalers(objects: Mapping[str, Any]) -> None:
    """Refuse a prepared optimizer whose scaler is not among the objects: a resume would begin with another scale.

    Raises:
        PolicyError: It names the optimizer, and says how to pass the scaler.
    """
    others = [thing for thing in objects.values() if not isinstance(thing, torch.optim.Optimizer)]
    given = {id(one) for thing in others for one in (thing, getattr(thing, "scaler", None)) if one is not None}
    for name, thing in objects.items():
        if unwrapped(thing) is thing:
            continue
        is_accelerate = _is_of(thing, "accelerate")
        scaler = getattr(thing if is_accelerate else thing._strategy.precision, "scaler", None)
        if scaler is not None and id(scaler) not in given:
            how = "scaler=accelerator.scaler" if is_accelerate else "precision=fabric.strategy.precision"
            msg = (
                f"{name} scales its gradients by a {type(scaler).__name__}, and the Loop was not given it: a resume "
                f"would begin with another scale. Pass {how}"
            )
            raise PolicyError(msg)


def accumulation_of(objects: Mapping[str, Any]) -> Callable[[], bool] | None:
    """Return a function that says whether accelerate's optimizers accumulate; None without any of them."""
    prepared = [thing for thing in objects.values() if unwrapped(thing) is not thing and _is_of(thing, "accelerate")]
    states = [thing.gradient_state for thing in prepared if hasattr(thing, "gradient_state")]
    return (lambda: not states[0].sync_gradients) if states else None  # All share one state.


def _is_of(thing: Any, *packages: str) -> bool:
    return any(kind.__module__.partition(".")[0] in packages for kind in type(thing).__mro__)
