"""The content of a payload: name, shape and dtype of each tensor, and the sets of weights among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import attrs

from checkpointer.errors import reading
from checkpointer.formats.inspection.work_limit import ENTRY, Work

MAX_DIMENSIONS: Final = 64
"""As many as torch computes with."""
MAX_ELEMENTS: Final = 1 << 60
"""Elements of a tensor, and each of its sizes, strides and offsets, at most."""
PACKED: Final = {"quint4x2": 2, "quint2x4": 4}
"""Elements in one byte, for dtypes that torch packs along the last dimension."""
_QUANTISED: Final = ("qint8", "quint8", "qint32", *PACKED)
OPAQUE: Final = ("float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")
"""Dtypes that torch stores, and cannot compute with."""
_BY_SIZE: Final[dict[int, tuple[str, ...]]] = {
    16: ("complex128",),
    8: ("float64", "complex64", "int64", "uint64"),
    4: ("float32", "complex32", "int32", "uint32", "qint32"),
    2: ("float16", "bfloat16", "int16", "uint16", "bits16"),
    1: (
        *("int8", "uint8", "bool", "qint8", "quint8", "quint4x2", "quint2x4"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"),
    ),
}
ITEM_SIZES: Final = {dtype: size for size, dtypes in _BY_SIZE.items() for dtype in dtypes}
"""Bytes of one element, by the name torch gives the dtype."""


def as_sizes(value: Any) -> tuple[int, ...] | None:
    """Return numbers such as the shape, the strides or the offsets of a tensor; None if no tensor has them."""
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        return None
    return tuple(value) if all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in value) else None


def as_shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor; None if no tensor has it."""
    shape = as_sizes(value)
    return shape if shape is not None and math.prod(size or 1 for size in shape) <= MAX_ELEMENTS else None


def dtype_named(name: str) -> Any:
    """Return torch's dtype of a name; None if it is not one whose elements are read here."""
    import torch

    found = getattr(torch, name, None) if name in ITEM_SIZES else None
    return found if isinstance(found, torch.dtype) else None


@attrs.frozen(kw_only=True)
class TensorInfo:
    """Name, dtype and shape of a tensor, known before a byte of it is read."""

    name: str
    """Its keys, joined by dots, such as ``"model.0.weight"``."""
    dtype: str
    """As torch names it, such as ``"float32"``."""
    shape: tuple[int, ...]
    layout: str = "strided"
    """As torch names it, such as ``"sparse_coo"``."""

    @property
    def is_dense(self) -> bool:
        """Whether its bytes are its elements, one after the other: it is neither sparse nor quantised."""
        return self.layout == "strided" and self.dtype not in _QUANTISED

    @property
    def is_numbers(self) -> bool:
        """Whether torch can compute with its elements as numbers."""
        return self.is_dense and self.dtype not in OPAQUE

    @property
    def kind(self) -> str:
        """Its dtype, and its layout if that is not the usual one."""
        return self.dtype if self.layout == "strided" else f"{self.dtype} {self.layout}"

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its elements; if tensors share memory, each counts."""
        per_byte = PACKED.get(self.dtype, 1)
        if per_byte > 1 and self.shape:
            return math.prod(self.shape[:-1]) * -(-self.shape[-1] // per_byte)
        return self.numel * ITEM_SIZES.get(self.dtype, 1)


class Tensors:
    """An opened payload. Nothing in it runs, neither when it is opened nor when it is read."""

    place: str = ""
    """The name of the file, for messages."""
    calls: tuple[str, ...] = ()
    """Functions that an ordinary unpickler would call, besides those that make tensors and plain containers."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        """Every tensor by its name, in the order of the payload."""
        self.others: dict[str, Any] = {}
        """Everything but tensors, by name: plain values as they are, objects as a short text in angle brackets."""
        self.parts: dict[str, Part] = {}
        """Every set of weights by the dotted path to it, in the order of the payload."""

    @property
    def models(self) -> Mapping[str, Part]:
        """The sets of weights that may be a model."""
        return self.parts

    def problems(self) -> Iterable[str]:
        """Return a message for each tensor whose bytes are not all there."""
        return ()

    def read(self, name: str) -> Any:
        """Return one tensor, on the CPU. Memory: that tensor's own.

        Raises:
            CorruptError: If its bytes are not there.
        """
        with reading(self.place or name):
            return self._read(name)

    def _read(self, name: str) -> Any:
        raise NotImplementedError

    def value(self, name: str) -> Any:
        """Return one of ``others`` as plain data; None if it is an object that only unpickling would make."""
        return self.others[name]

    def close(self) -> None:
        """Close the files."""


# Sets of weights


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
    """``_metadata`` of a ``state_dict``: the version of each module, by the module's path."""


@attrs.frozen(kw_only=True)
class Part:
    """A set of weights: the name of each tensor in a ``state_dict``, and its name in the payload."""

    names: Mapping[str, str]
    values: Mapping[str, str] = MappingProxyType({})
    """The same for what is not a tensor, such as ``_extra_state``."""
    versions: Mapping[str, Any] = MappingProxyType({})
    """As `Branch.versions`."""


Entries = Iterable[tuple[str, Any, bool]]
"""Keys, values, and whether each is what a ``state_dict`` would have."""


def tree_of(
    root: Any,
    children: Callable[[str, Any], tuple[Branch, Entries] | None],
    add: Callable[[str, Any], Leaf],
    work: Work | None = None,
) -> Branch:
    """Return the tree of what is in ``root``; what contains itself is entered once on each way to it.

    ``children`` returns what a value under a key holds, if it is entered; ``add`` takes any other under its full name.
    ``work`` bounds the entries and their names; None: there is no bound.
    """
    found = children("", root)
    if found is None:
        return Branch("mapping", {"": add("(the whole)", root)})
    top = found[0]
    frames = [(top, iter(found[1]), "", id(root))]
    following: dict[tuple[int, str], int] = {}
    within = {id(root)}
    while frames:
        branch, entries, path, identity = frames[-1]
        entry = next(entries, None)
        if entry is None:
            frames.pop()
            within.discard(identity)
            continue
        key, value, is_weight = entry
        if work is not None:
            work.spend(ENTRY + len(path) + len(key))
        found = None if id(value) in within else children(key, value)
        node = add(f"{path}{key}" or "(the whole)", value) if found is None else found[0]
        if is_weight:
            branch.children[free_key(key, following, branch.children)] = node
        if found is not None:
            within.add(id(value))
            frames.append((found[0], iter(found[1]), f"{path}{key}.", id(value)))
    return top


def free_key(key: str, following: dict[tuple[int, str], int], *taken: Container[str]) -> str:
    """Return the key, with the first number behind it that makes it differ from those that are taken.

    ``following`` has the next number of each key that came twice.
    """
    if not any(key in keys for keys in taken):
        return key
    place = id(taken[0]), key
    count = following.get(place, 2)
    while any(f"{key}#{count}" in keys for keys in taken):
        count += 1
    following[place] = count + 1
    return f"{key}#{count}"


def parts_in(tree: Branch, counts: Callable[[str], bool] = lambda name: True) -> dict[str, Part]:
    """Return every set of weights in a tree, by its path.

    A mapping that holds tensors is one, unless another lies within it; then its own tensors are one if one of them
    ``counts`` as a weight. A pickled module is one. The state of an optimizer is not.
    """
    has_part: set[int] = set()
    found: dict[str, Part] = {}
    for path, branch, above in reversed([*_branches(tree)]):  # Inner branches come first.
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
        if branch.kind == "mapping" and {"state", "param_groups"} <= branch.children.keys():
            continue  # An optimizer.
        yield path, branch, above
        if branch.kind != "module":
            todo.extend(
                (f"{path}.{key}" if path else key, child, branch)
                for key, child in reversed(branch.children.items())
                if isinstance(child, Branch) and not key.endswith("_extra_state")
            )


def _part(branch: Branch, counts: Callable[[str], bool], *, has_inner: bool) -> Part | None:
    if branch.kind == "other":
        return None
    leaves = {key: child for key, child in branch.children.items() if isinstance(child, Leaf)}
    if branch.kind == "module" or not has_inner:
        if branch.kind != "module" and not any(leaf.is_tensor for leaf in leaves.values()):
            return None
        leaves = dict(_leaves(branch))
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
