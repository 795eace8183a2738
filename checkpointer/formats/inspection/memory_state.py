"""Looks into a state that is in memory already, as into a payload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from checkpointer.formats.inspection.tensors import (
    Branch,
    Entries,
    Leaf,
    TensorInfo,
    Tensors,
    free_key,
    parts_in,
    tree_of,
)


class StateContents(Tensors):
    """A state, such as ``torch.load`` returns it.

    Example:
        >>> contents = StateContents({"model": torch.nn.Linear(2, 1).state_dict(), "step": 3})
        >>> [*contents.parts], [*contents.tensors], contents.others
        (['model'], ['model.weight', 'model.bias'], {'step': 3})
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self._found: dict[str, torch.Tensor] = {}
        self._following: dict[tuple[int, str], int] = {}
        self.parts = parts_in(tree_of(state, _children, self._add), lambda name: self.tensors[name].numel > 1)

    def _add(self, name: str, value: Any) -> Leaf:
        name = free_key(name, self._following, self._found, self.others)
        if not isinstance(value, torch.Tensor):
            self.others[name] = value
            return Leaf(name, is_tensor=False)
        dtype, layout = (str(what).removeprefix("torch.") for what in (value.dtype, value.layout))
        shape = () if torch.nn.parameter.is_lazy(value) else tuple(value.shape)
        self.tensors[name] = TensorInfo(name=name, dtype=dtype, shape=shape, layout=layout)
        self._found[name] = value
        return Leaf(name)

    def _read(self, name: str) -> Any:
        return self._found[name]


def _children(_: str, value: Any) -> tuple[Branch, Entries] | None:
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, Mapping):
        branch, items = Branch("mapping", versions=getattr(value, "_metadata", {})), value.items()
        return (branch, ((str(key), child, True) for key, child in items)) if items else None
    if isinstance(value, (list, tuple)) and any(isinstance(i, (Mapping, torch.Tensor, list, tuple)) for i in value):
        return Branch("other"), ((str(number), child, True) for number, child in enumerate(value))
    return None
