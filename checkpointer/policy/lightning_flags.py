"""The flat arguments of Lightning's ``ModelCheckpoint``, translated to a trigger and to rules.

Only a translation: no flag has a meaning beyond the trigger or rule it becomes. Meanings and validation errors follow
Lightning 2.6, so that a configuration that people know says the same here.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from checkpointer.errors import PolicyError
from checkpointer.policy.retention import KeepAll, KeepBest, KeepLast, Limit, Rule
from checkpointer.policy.triggers import AtSteps, EveryEpochs, EverySeconds, EverySteps, Trigger

__all__ = ["rules_of", "trigger_of"]


def trigger_of(steps: int | None, epochs: int | None, interval: timedelta | None) -> Trigger:
    """Return the trigger of ``every_n_train_steps``, ``every_n_epochs`` and ``train_time_interval``."""
    for name, value in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            msg = f"{name} is {value!r}; expected a whole number of at least 0 (0 turns it off)"
            raise PolicyError(msg)
    given = {
        "every_n_train_steps": EverySteps(steps) if steps else None,
        "every_n_epochs": EveryEpochs(epochs) if epochs else None,
        "train_time_interval": None if interval is None else EverySeconds(interval),
    }
    triggers = {name: trigger for name, trigger in given.items() if trigger is not None}
    if len(triggers) > 1:
        msg = (
            f"{' and '.join(triggers)} are mutually exclusive; compose them instead: "
            f"Policy(when=AnyOf({', '.join(map(repr, triggers.values()))}), ...)"
        )
        raise PolicyError(msg)
    if steps is None and epochs is None and interval is None:
        return EveryEpochs(1)
    return next(iter(triggers.values()), AtSteps())


def rules_of(monitor: str | None, mode: Literal["min", "max"], top_k: int) -> list[Rule | Limit]:
    """Return the rules of ``monitor``, ``mode`` and ``save_top_k``."""
    if mode not in ("min", "max"):
        msg = f"mode is {mode!r}; expected 'min' or 'max'"
        raise PolicyError(msg)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < -1:
        msg = f"save_top_k is {top_k!r}; expected -1 (all), 0 (none) or how many to keep"
        raise PolicyError(msg)
    if monitor is None and top_k not in (-1, 0, 1):
        msg = (
            f"save_top_k={top_k} with monitor=None has nothing to rank by; name the metric with monitor=, "
            f"or keep the newest ones with Policy(keep=[KeepLast({top_k})])"
        )
        raise PolicyError(msg)
    if top_k == 0:
        return []
    if monitor is None:
        return [KeepAll()] if top_k == -1 else [KeepLast(1)]
    if top_k == -1:
        return [KeepAll(), KeepBest(1, monitor, mode=mode, ties="incumbent")]
    return [KeepBest(top_k, monitor, mode=mode, ties="incumbent")]
