"""In manual optimization: a state that was captured before the optimizer stepped takes the place of the one after."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from checkpointer import CheckpointerWarning

__all__ = ["before_step", "has_captured"]


def has_captured(module: Any) -> bool:
    """Return whether the module has kept states in ``saved_models``, as Lightning's callback wants it."""
    return isinstance(getattr(module, "saved_models", None), dict) and bool(module.saved_models)


def before_step(module: Any, dump: dict[str, Any]) -> dict[str, Any]:
    """Return the dump with the weights of the newest of ``module.saved_models``; the module itself is not touched.

    Those are the state of ``module.layer``, or of the whole module, or of a part of either.

    Raises:
        TypeError: If what was captured is no dictionary.
    """
    captured = module.saved_models[max(module.saved_models)]
    if not isinstance(captured, Mapping):
        msg = f"module.saved_models holds a {type(captured).__name__}; a saved model state must be a dictionary"
        raise TypeError(msg)
    weights = dump["state_dict"]
    for prefix in ("layer.", ""):
        named = {prefix + name: value for name, value in captured.items()}
        if named.keys() <= weights.keys():
            return {**dump, "state_dict": {**weights, **named}}
    strange = sorted(captured.keys() - weights.keys())
    msg = (
        f"module.saved_models has {', '.join(map(repr, strange[:3]))}, which neither the module nor its layer has; "
        "what is saved is the state after the optimizer stepped"
    )
    warnings.warn(msg, CheckpointerWarning, stacklevel=2)
    return dump
