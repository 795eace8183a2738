"""The state of a sharded training: each rank writes its shards, and reads them in the layout that it has now.

A DCP folder has the tensors of the objects, as ``model.0.weight``. All else is in two kinds of values: one that all
ranks have alike (``loop.shared``), with marks in place of the tensors, and one for each rank (``loop.ranks.0``).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch

from checkpointer.formats.pickler import is_dtensor
from checkpointer_torch.tensor_layouts import Layout, room_for

if TYPE_CHECKING:
    # It imports torch.distributed.checkpoint, which takes a second.
    from checkpointer.formats.dcp_reader import FolderReader
    from checkpointer_torch.training_state import TrainingState

KEY: Final = "loop"
"""The loop's own state is under this key, beside the objects."""
_SHARED: Final = "shared"
_RANKS: Final = "ranks"
_TENSOR: Final = "tensor of this checkpoint"
"""Marks the place of a tensor in the shared value."""
_CONTAINERS: Final = (dict, OrderedDict, list, tuple)

Path = tuple[Any, ...]


@attrs.define
class ShardedState:
    """The state function of a manager with ``format="dcp"``, and the `Target` that a resume reads into."""

    _source: TrainingState
    _rank: int
    _size: int
    _is_reading: bool = attrs.field(default=False, init=False)
    _shared: Any = attrs.field(default=None, init=False)
    _own: list[Any] = attrs.field(factory=list, init=False)
    _rooms: dict[str, Any] = attrs.field(factory=dict, init=False)

    def __call__(self) -> Any:
        """Return the state to write; within `reading` the target to read into."""
        if self._is_reading:
            return self
        skeleton, tensors = split(self._source.take_shared())
        skeleton[KEY][_RANKS] = self._size
        return {**tensors, KEY: {_SHARED: (skeleton,), _RANKS: {str(self._rank): (self._source.take_own(),)}}}

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Let the manager read into the layout of this training."""
        self._is_reading = True
        try:
            yield
        finally:
            self._is_reading = False
            self._shared, self._own, self._rooms = None, [], {}

    def wanted(self, folder: FolderReader) -> dict[str, Any]:
        """See `Target.wanted`."""
        self._shared, self._rooms = None, {}
        if not folder.has_value(f"{KEY}.{_SHARED}"):  # No Loop wrote it.
            return folder.whole()
        (self._shared,) = folder.value(f"{KEY}.{_SHARED}")
        saved: int = self._shared[KEY][_RANKS]
        # On another number of ranks it matters whether the ranks had the same things.
        ranks = range(saved) if saved != self._size else [self._rank]
        self._own = [None] * saved
        for rank in ranks:
            (self._own[rank],) = folder.value(f"{KEY}.{_RANKS}.{rank}")
        return self._make_room(folder)

    def _make_room(self, folder: FolderReader) -> dict[str, Any]:
        objects = self._source.objects
        like, meshes = objects.likes(), objects.meshes
        wanted: dict[str, dict[str, Any]] = {}
        for (part, key), path, layout in _marks(self._shared):
            name = f"{part}.{key}"
            shape, dtype = folder.tensors[name]
            if part not in objects.shared:  # A difference, which is reported when the state is put back.
                self._rooms[name] = torch.empty(shape, dtype=dtype, device="meta")
                continue
            room = room_for(name, like(path), meshes, saved=layout, shape=shape, dtype=dtype)
            self._rooms[name] = wanted.setdefault(part, {})[key] = room
        return wanted

    def result(self, state: dict[str, Any]) -> Any:
        """See `Target.result`."""
        if self._shared is None:
            return state
        joined = _filled(self._shared, lambda part, key: self._rooms[f"{part}.{key}"])
        joined[KEY][_RANKS] = self._own
        return joined


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return a state with a mark in place of each tensor, and the tensors by the marks: ``tensors[part][key]``."""
    tensors: dict[str, dict[str, Any]] = {}

    def visit(value: Any, path: Path) -> Any:
        if isinstance(value, torch.Tensor) and _is_array(value) and path[0] != KEY:
            part, key = path[0], ".".join(map(str, path[1:]))
            while key in tensors.setdefault(part, {}):
                key += "'"
            tensors[part][key] = value.detach()
            layout = Layout.of(value)
            return {_TENSOR: [[part, key], None if layout is None else layout.to_plain()]}
        return _mapped(value, lambda key, item: visit(item, (*path, key)))

    return {key: visit(value, (key,)) for key, value in state.items()}, tensors


def joined(state: Any) -> Any:
    """Return the state that was taken, if `ShardedState` has split it: read without a target, all of it is whole."""
    own = state.get(KEY) if isinstance(state, Mapping) else None
    if not isinstance(own, Mapping) or _SHARED not in own:
        return state
    (skeleton,) = own[_SHARED]
    result = _filled(skeleton, lambda part, key: state[part][key])
    ranks = own[_RANKS]
    result[KEY][_RANKS] = [ranks[str(number)][0] for number in range(result[KEY][_RANKS])]
    return result


def _filled(skeleton: Any, tensor: Callable[[str, str], Any]) -> Any:
    if _is_mark(skeleton):
        return tensor(*skeleton[_TENSOR][0])
    return _mapped(skeleton, lambda _, item: _filled(item, tensor))


def _marks(value: Any, path: Path = ()) -> Iterator[tuple[tuple[str, str], Path, Layout | None]]:
    if _is_mark(value):
        (part, key), layout = value[_TENSOR]
        yield (part, key), path, None if layout is None else Layout.from_plain(layout)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _marks(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _marks(item, (*path, number))


def _is_mark(value: Any) -> bool:
    return type(value) is dict and _TENSOR in value


def _mapped(value: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Return a container of the same kind with other items; anything else as it is."""
    if type(value) not in _CONTAINERS:
        return value
    if isinstance(value, dict):
        result = type(value)((key, function(key, item)) for key, item in value.items())
        if hasattr(value, "_metadata"):
            result._metadata = value._metadata  # type: ignore[attr-defined]
        return result
    return type(value)(function(number, item) for number, item in enumerate(value))


def _is_array(tensor: torch.Tensor) -> bool:
    """Return whether DCP writes a tensor as numbers. It is pickled whole if it has another layout or a class."""
    if is_dtensor(tensor):
        return True
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return is_plain and tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)
