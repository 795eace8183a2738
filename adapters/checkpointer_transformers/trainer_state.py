"""The Trainer's own state: the best checkpoint by the records, the run, and what was logged."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Final

from checkpointer import Manifest, Observation, Policy
from checkpointer.ports import Clock

_KEY: Final = "checkpointer"
"""The manager's state has this key in what the Trainer keeps for callbacks, which takes any name."""
_OWES: Final = "owes_evaluation"
"""Whether a signal left out the evaluation of that step, or ended it."""
_SUMMARY: Final = "train_runtime"
"""This key is only in the log of a whole training, which does not belong to a step."""


Best = tuple[float | None, int | None, str | None]
"""Metric, step and name of the best checkpoint; None if no checkpoint is ranked yet."""


def best_of(policy: Policy, manifest: Manifest) -> Best | None:
    """Return the best of the records; None if the policy has no ranked rule, so that the Trainer's own best stays."""
    if policy.ranking is None:
        return None
    best = policy.best_of(manifest.history)
    return (None, None, None) if best is None else (policy.ranking.value(best), best.step, best.name)


def show_best(best: Best | None, state: Any, output_dir: str) -> None:
    """Write the best checkpoint into the Trainer's state, unless it is None."""
    if best is None:
        return
    state.best_metric, step, name = best
    state.best_model_checkpoint = None if name is None else os.path.join(output_dir, name)
    if hasattr(state, "best_global_step"):  # Older ones do not have it.
        state.best_global_step = step


def epoch_of(state: Any) -> int:
    """Return the index of the epoch in progress or just ended; the Trainer has it as a fraction."""
    return max(0, math.ceil(state.epoch or 0) - 1)


def ends_epoch(state: Any) -> bool:
    """Return whether the epoch is whole."""
    return math.floor(state.epoch or 0) > epoch_of(state)


def observation(metrics: Mapping[str, Any], state: Any, clock: Clock, *, epoch_end: bool) -> Observation:
    """Return what was measured at the Trainer's step, which is now."""
    return Observation(
        metrics=metrics, step=state.global_step, epoch=epoch_of(state), epoch_end=epoch_end, time=clock.time()
    )


def numbers_of(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics in a log of one step; none if it sums up the training."""
    if _SUMMARY in logs:
        return {}
    return {key: value for key, value in logs.items() if key != "epoch" and _is_number(value)}


def evaluated(name: str) -> str:
    """Return the name that an evaluation gives a metric."""
    return name if name.startswith("eval_") else f"eval_{name}"


def logged_at(state: Any, step: int) -> dict[str, Any]:
    """Return the metrics that the Trainer's own log has of a step."""
    logs = [log for log in state.log_history if log.get("step") == step]
    return {key: value for log in logs for key, value in numbers_of(log).items() if key != "step"}


def _is_number(value: Any) -> bool:
    if isinstance(value, (bool, str)):
        return False
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)


def owes_evaluation(state: Any) -> bool:
    """Return whether the checkpoint that the Trainer resumed from was saved before an evaluation that was due."""
    return bool(saved_state(state).get(_OWES))


def saved_state(state: Any) -> Mapping[str, Any]:
    """Return the manager's state in the checkpoint that the Trainer resumed from; empty if there is none."""
    saved = (state.stateful_callbacks or {}).get(_KEY, {})
    return saved if isinstance(saved, dict) else {}


def save_state(state: Any, saved: Mapping[str, Any], *, owes: bool) -> None:
    """Put the manager's state into the Trainer's; ``owes``: a resume has to run the evaluation of this step."""
    state.stateful_callbacks[_KEY] = {**saved, _OWES: owes}
