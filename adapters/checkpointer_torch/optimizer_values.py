"""What ``load_state_dict`` of an optimizer changes in the states of the parameters, and how a resume undoes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs
import torch

_SEQUENCES: Final = (list, tuple, deque)


def without_texts(value: Any) -> Any:
    """Return a state without the values that torch takes apart, as a text, or cannot load at all, as a range.

    Torch makes a new object of each iterable value from its items. Of a text it makes the name of a generator.
    """
    if isinstance(value, Mapping):
        return {key: without_texts(item) for key, item in value.items()}
    if isinstance(value, _SEQUENCES):
        return _made_like(value, map(without_texts, value))
    return None if isinstance(value, Iterable) and not torch.is_tensor(value) else value


def undone(
    now: Any, saved: Any, choose: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor], key: Any = None
) -> Any:
    """Return the saved value, at the places where the loaded one lies; ``choose`` decides for each tensor."""
    if torch.is_tensor(saved):
        return choose(key, now, saved) if torch.is_tensor(now) else now
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        return {**now, **{name: undone(now[name], item, choose, name) for name, item in saved.items() if name in now}}
    if isinstance(saved, _SEQUENCES) and isinstance(now, _SEQUENCES) and len(now) == len(saved):
        return _made_like(now, (undone(one, item, choose) for one, item in zip(now, saved, strict=True)))
    # An optimizer with a load_state_dict of its own may have made something else of the saved value.
    return saved if now is None and isinstance(saved, Iterable) else now


def _made_like(sequence: Any, items: Iterable[Any]) -> Any:
    return deque(items, sequence.maxlen) if isinstance(sequence, deque) else type(sequence)(items)


@attrs.frozen
class GroupLinks:
    """The states of an optimizer that refer to one of its groups, as those of optimi with ``gradient_release``.

    Torch loads a copy of the group, which a scheduler does not change.
    """

    links: tuple[tuple[torch.Tensor, Any, int], ...]
    """The parameter, the key in its state, and the number of the group."""

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> GroupLinks:
        """Return the links of an optimizer, before it loads a state."""
        numbers = {id(group): number for number, group in enumerate(optimizer.param_groups)}
        states = [(parameter, state) for parameter, state in optimizer.state.items() if isinstance(state, dict)]
        found = [
            (parameter, key, numbers.get(id(value))) for parameter, state in states for key, value in state.items()
        ]
        return cls(tuple((parameter, key, number) for parameter, key, number in found if number is not None))

    def put_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the states refer to the groups again."""
        for parameter, key, number in self.links:
            optimizer.state[parameter][key] = optimizer.param_groups[number]
