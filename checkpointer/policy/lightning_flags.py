"""The flat arguments of Lightning's ``ModelCheckpoint``, translated to the parts of a policy.

Only a translation: no flag has a meaning beyond the trigger, rule or setting it becomes. Meanings and validation
errors follow Lightning 2.6, so that a configuration that people know says the same here.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

from checkpointer.errors import PolicyError
from checkpointer.policy.naming import Naming
from checkpointer.policy.retention import KeepAll, KeepBest, KeepLast, Limit, Rule
from checkpointer.policy.triggers import AtSteps, EveryEpochs, EverySeconds, EverySteps, Trigger

__all__ = ["policy_parts"]


def policy_parts(
    *,
    monitor: str | None = None,
    mode: Literal["min", "max"] = "min",
    save_top_k: int = 1,
    save_last: bool | Literal["link"] | None = None,
    every_n_train_steps: int | None = None,
    every_n_epochs: int | None = None,
    train_time_interval: timedelta | None = None,
    filename: str | None = None,
    auto_insert_metric_name: bool = True,
    enable_version_counter: bool = True,
    save_weights_only: bool = False,
    save_on_exception: bool = False,
) -> dict[str, Any]:
    """Return the keyword arguments of a `Policy`; see `Policy.from_flags` for their meaning."""
    if mode not in ("min", "max"):
        msg = f"mode is {mode!r}; expected 'min' or 'max'"
        raise PolicyError(msg)
    if save_last not in (None, True, False, "link"):
        msg = f"save_last is {save_last!r}; expected True, False, None or 'link'"
        raise PolicyError(msg)
    return {
        "when": _when(every_n_train_steps, every_n_epochs, train_time_interval),
        "keep": _keep(monitor, mode, save_top_k),
        "name": Naming(
            filename,
            auto_insert=auto_insert_metric_name,
            version_counter=enable_version_counter,
            missing="zero",
            rescue="template",
        ),
        "last": "link" if save_last == "link" else "copy" if save_last else None,
        "contents": "weights" if save_weights_only else "full",
        "rescue": save_on_exception,
    }


def _when(steps: int | None, epochs: int | None, interval: timedelta | None) -> Trigger:
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


def _keep(monitor: str | None, mode: Literal["min", "max"], top_k: int) -> list[Rule | Limit]:
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
