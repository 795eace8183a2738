"""A schedule-free optimizer has two sets of weights; a checkpoint is ranked by what was measured of the set it has.

``optimizer.train()`` puts the training weights into the model, ``optimizer.eval()`` those that a validation measures.
The optimizer's ``train_mode`` says which of them a state has. If it has those of training, the record's reason says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import attrs

from checkpointer.policy.decide import Save
from checkpointer.records.record import Observation, Record

_TRAINING: Final = "the training weights of a schedule-free optimizer"
_MARK: Final = f"with {_TRAINING}"
"""How the reason of a record ends whose state has those."""
OTHER: Final = " (other weights)"
"""How the name of a metric ends that was measured of other weights than the checkpoint has."""
_ADVICE: Final = (
    "Let the save come between optimizer.eval() and optimizer.train(): see 'Averaged weights' in docs/loops.md"
)
_MANY: Final = 32
"""A list of more values than this is not a list of optimizers."""


def modes_of(optimizer: Any) -> list[bool]:
    """Return the modes of a schedule-free optimizer or of its state, True for training; nothing for anything else."""
    is_state = isinstance(optimizer, dict)
    groups = optimizer.get("param_groups") if is_state else getattr(optimizer, "param_groups", None)
    if not isinstance(groups, (list, tuple)):
        return []
    own = None if is_state else getattr(optimizer, "train_mode", None)
    modes = [own, *(group.get("train_mode") for group in groups if isinstance(group, dict))]
    return [mode for mode in modes if isinstance(mode, bool)]


def trains(optimizers: Iterable[Any]) -> bool:
    """Return whether one of some optimizers, or of their states, has its training weights in the model."""
    return any(any(modes_of(optimizer)) for optimizer in optimizers)


def states_in(state: Any) -> Iterable[Any]:
    """Yield what may be the state of an optimizer: the state itself, its values, and those in a short list of it."""
    if isinstance(state, dict):
        yield state
        # One check for each tensor of many.
        for value in [value for value in state.values() if isinstance(value, (dict, list, tuple))]:
            if isinstance(value, dict):
                yield value
            elif len(value) <= _MANY:
                yield from (item for item in value if isinstance(item, dict))


def marked(decision: Save, optimizers: Iterable[Any]) -> Save:
    """Return the decision with what its record has to say, if the state has training weights."""
    if decision.reason.endswith(_MARK) or not trains(optimizers):
        return decision
    return attrs.evolve(decision, reason=f"{decision.reason}; {_MARK}")


def ranking_doubt(decision: Save, ranked_by: Iterable[str]) -> str:
    """Return what to say of a decision that ranks training weights; empty if it does not."""
    names = sorted(decision.observation.metrics.keys() & set(ranked_by))
    if not names or decision.kind != "regular" or not decision.reason.endswith(_MARK):
        return ""
    name = ", ".join(names)
    return (
        f"step {decision.observation.step} is ranked by {name}, and is saved {_MARK}. If {name} was "
        f"measured after optimizer.eval(), the checkpoint does not have those weights. {_ADVICE}"
    )


def apart_from_saved(now: Observation, saved: Record | None) -> tuple[Observation, str]:
    """Return late metrics of a saved step, with a name of their own if the checkpoint has other weights, and a warning.

    What the record has already, with the same value, was measured of the weights that it has.
    """
    if saved is None or not saved.reason.endswith(_MARK):
        return now, ""
    metrics = now.metrics.items()
    late = {name for name, v in metrics if not name.endswith(OTHER) and repr(saved.metrics.get(name)) != repr(v)}
    if not late:
        return now, ""
    apart = {f"{name}{OTHER}" if name in late else name: value for name, value in metrics}
    return attrs.evolve(now, metrics=apart), unranked(late, saved.step)


def unranked(names: Iterable[str], step: int) -> str:
    """Return what to say of metrics that do not rank the checkpoint of a step."""
    return (
        f"{', '.join(sorted(names))} does not rank the checkpoint of step {step}, which has {_TRAINING}; a validation "
        f"measures those of optimizer.eval(). {_ADVICE}"
    )
