"""Finds the sets of weights in a payload by their structure: each mapping of names to tensors, each whole module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import attrs

__all__ = ["Branch", "Leaf", "Part", "flat", "parts_in"]

_EXTRA: str = "_extra_state"


@attrs.frozen
class Leaf:
    """A tensor or a value."""

    name: str
    """Its name in the payload."""
    is_tensor: bool = True


@attrs.define
class Branch:
    """A container or an object, and what it holds."""

    kind: Literal["mapping", "module", "other"]
    children: dict[str, Branch | Leaf] = attrs.field(factory=dict)
    versions: Mapping[str, Any] = MappingProxyType({})
    """``_metadata`` of a ``state_dict``: what each module says about its version, by the module's path."""


@attrs.frozen(kw_only=True)
class Part:
    """A set of weights: what a ``state_dict`` would call each tensor, and what the payload calls it."""

    names: Mapping[str, str]
    values: Mapping[str, str] = MappingProxyType({})
    """The same for what is not a tensor, such as ``_extra_state``."""
    versions: Mapping[str, Any] = MappingProxyType({})
    """As `Branch.versions`."""


def flat(names: Mapping[str, str]) -> dict[str, Part]:
    """Return the one part of a payload that holds tensors under these names and nothing else."""
    return {"": Part(names=names)} if names else {}


def parts_in(tree: Branch, counts: Callable[[str], bool] = lambda name: True) -> dict[str, Part]:
    """Return every set of weights in a tree, by its path.

    A mapping that holds tensors is one, unless another lies within it; then its own tensors are one if one of them
    ``counts``. A pickled module is one. The state of an optimizer is none.

    Args:
        tree: The payload.
        counts: Whether the tensor of this name, beside other sets of weights, may be a weight.

    Example:
        >>> tree = Branch("mapping", {"model": Branch("mapping", {"w": Leaf("model.w")}), "step": Leaf("step", False)})
        >>> parts_in(tree)["model"].names
        {'w': 'model.w'}
    """
    branches = [*_branches(tree)]
    has_part: set[int] = set()
    found: dict[str, Part] = {}
    for path, branch, above in reversed(branches):  # What is inside comes first.
        part = _part(branch, counts, has_inner=id(branch) in has_part)
        if part is not None:
            found[path] = part
        if above is not None and (part is not None or id(branch) in has_part):
            has_part.add(id(above))
    return dict(reversed(found.items()))


def _branches(tree: Branch) -> Iterator[tuple[str, Branch, Branch | None]]:
    """Yield every branch that may be a set of weights or hold one, with its path and what it is in."""
    todo: list[tuple[str, Branch, Branch | None]] = [("", tree, None)]
    while todo:
        path, branch, above = todo.pop()
        if _is_optimizer(branch):
            continue
        yield path, branch, above
        if branch.kind != "module":
            inner = [(key, child) for key, child in branch.children.items() if isinstance(child, Branch)]
            todo.extend(
                (f"{path}.{key}" if path else key, child, branch)
                for key, child in reversed(inner)
                if not key.endswith(_EXTRA)
            )


def _is_optimizer(branch: Branch) -> bool:
    return branch.kind == "mapping" and {"state", "param_groups"} <= branch.children.keys()


def _part(branch: Branch, counts: Callable[[str], bool], *, has_inner: bool) -> Part | None:
    if branch.kind == "other":
        return None
    leaves = {key: child for key, child in branch.children.items() if isinstance(child, Leaf)}
    if branch.kind == "module" or not has_inner:
        leaves = dict(_leaves(branch))
        direct = branch.kind == "module" or any(isinstance(c, Leaf) and c.is_tensor for c in branch.children.values())
        if not direct:
            return None
    elif not any(leaf.is_tensor and counts(leaf.name) for leaf in leaves.values()):
        return None
    names = {name: leaf.name for name, leaf in leaves.items() if leaf.is_tensor}
    values = {name: leaf.name for name, leaf in leaves.items() if not leaf.is_tensor}
    return Part(names=names, values=values, versions=branch.versions) if names else None


def _leaves(branch: Branch) -> Iterator[tuple[str, Leaf]]:
    """Yield all leaves beneath, under the names that a ``state_dict`` gives them."""
    todo: list[tuple[str, Branch | Leaf]] = [("", branch)]
    while todo:
        path, node = todo.pop()
        if isinstance(node, Leaf):
            yield path, node
        else:
            todo.extend((f"{path}.{key}" if path else key, child) for key, child in reversed(node.children.items()))
