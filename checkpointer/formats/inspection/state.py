"""Looks into a state that is in memory already, as into a payload."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from checkpointer.formats.inspection.tensors import TensorInfo
from checkpointer.formats.inspection.weight_sets import Branch, Leaf, parts_in

__all__ = ["StateContents"]


class StateContents:
    """A state, such as ``torch.load`` returns it, see `Tensors`.

    Example:
        >>> contents = StateContents({"model": torch.nn.Linear(2, 1).state_dict(), "step": 3})
        >>> [*contents.parts], [*contents.tensors], contents.others
        (['model'], ['model.weight', 'model.bias'], {'step': 3})
    """

    def __init__(self, state: Any) -> None:
        self._found: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.others: dict[str, Any] = {}
        self.calls: tuple[str, ...] = ()
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
        self._found[name] = value
        if not isinstance(value, torch.Tensor):
            self.others[name] = value
            return Leaf(name, is_tensor=False)
        dtype, layout = (str(what).removeprefix("torch.") for what in (value.dtype, value.layout))
        shape = () if torch.nn.parameter.is_lazy(value) else tuple(value.shape)
        self.tensors[name] = TensorInfo(name=name, dtype=dtype, shape=shape, layout=layout)
        return Leaf(name)

    def problems(self) -> Iterable[str]:
        """See `Tensors.problems`."""
        return ()

    def read(self, name: str) -> Any:
        """See `Tensors.read`: the tensor itself."""
        return self._found[name]

    def value(self, name: str) -> Any:
        """See `Tensors.value`."""
        return self._found[name]

    def close(self) -> None:
        """See `Tensors.close`."""


def _children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(value, torch.nn.Module):
        return value.state_dict().items()
    if isinstance(value, Mapping):
        return value.items() or None
    if isinstance(value, (list, tuple)):
        return (
            enumerate(value) if any(isinstance(item, (Mapping, torch.Tensor, list, tuple)) for item in value) else None
        )
    return None
