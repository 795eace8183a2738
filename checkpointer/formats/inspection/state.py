"""Looks into a state that is in memory already, as into a payload."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from checkpointer.formats.inspection.tensors import Branch, Leaf, TensorInfo, Tensors, parts_in

__all__ = ["StateContents"]


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
        tree = self._grow(state, (), frozenset())
        whole = tree if isinstance(tree, Branch) else Branch("mapping", {"": tree})
        self.parts = parts_in(whole, lambda name: self.tensors[name].numel > 1)

    def _grow(self, value: Any, path: tuple[str, ...], above: frozenset[int]) -> Branch | Leaf:
        children = None if id(value) in above or len(path) > 100 else _children(value)
        if children is None:
            return self._leaf(value, ".".join(path) or "(the whole)")
        is_mapping = isinstance(value, (Mapping, torch.nn.Module))
        branch = Branch("mapping" if is_mapping else "other", versions=getattr(value, "_metadata", {}))
        inside = above | {id(value)}
        for key, child in children:
            branch.children[str(key)] = self._grow(child, (*path, str(key)), inside)
        return branch

    def _leaf(self, value: Any, name: str) -> Leaf:
        if not isinstance(value, torch.Tensor):
            self.others[name] = value
            return Leaf(name, is_tensor=False)
        dtype, layout = (str(what).removeprefix("torch.") for what in (value.dtype, value.layout))
        shape = () if torch.nn.parameter.is_lazy(value) else tuple(value.shape)
        self.tensors[name] = TensorInfo(name=name, dtype=dtype, shape=shape, layout=layout)
        self._found[name] = value
        return Leaf(name)

    def read(self, name: str) -> Any:
        """See `Tensors.read`: the tensor itself."""
        return self._found[name]


def _children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(value, torch.nn.Module):
        return value.state_dict().items()
    if isinstance(value, Mapping):
        return value.items() or None
    if isinstance(value, (list, tuple)) and any(isinstance(i, (Mapping, torch.Tensor, list, tuple)) for i in value):
        return enumerate(value)
    return None
