"""Copies a state into host memory that is used again, so that a later write sees the state of now.

A state is taken apart as `torch.save` does it, by pickling: so views, strides, shared storages, tied weights and
everything else that a payload would hold come out as they went in, and what it would not hold fails here already.
Plain tensors, and the storages of all others, do not go through the pickle: see `checkpointer.formats.tensor_copies`.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import io
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import attrs

from checkpointer.errors import SaveError
from checkpointer.formats.pickler import Pickler, culprit, pickle_dry
from checkpointer.formats.tensor_copies import Memory, Sources, Streams, is_plain
from checkpointer.formats.tensor_storage import CutStorageError

_PROTOCOL: Final = 5
_QUIET: Final = frozenset({"_codecs", "builtins", "collections", "copyreg", "numpy", "torch"})
"""Packages whose classes leave the tensors of a state as they are while the state is put together."""


@attrs.define
class Snapshot:
    """One copy of a state, until it is released."""

    state: Any
    """The copy. On CUDA it is whole only after `wait`."""
    _memory: Memory | None
    _events: list[Any]
    _sources: list[Any]
    """What is being copied: its memory must not be freed before."""
    _give_back: Callable[[Memory], None]

    def wait(self) -> Any:
        """Return the state, once all of it is there. For the thread that writes it."""
        assert self._memory is not None, "the snapshot is released"
        for event in self._events:
            event.synchronize()
        self._events, self._sources = [], []
        return self.state

    def release(self) -> None:
        """Give the memory back for the next snapshot: the state must not be used any more. Twice does nothing."""
        memory, self.state, self._memory = self._memory, None, None
        self._events, self._sources = [], []
        if memory is not None:
            self._give_back(memory)


@attrs.define
class Snapshots:
    """Takes snapshots, one after the other, into the same memory.

    What reads a snapshot must not change its tensors: the next snapshot is in the same ones.

    Args:
        copies: How many may be alive at a time.
        takes_shards: Whether a DTensor of which other processes hold a part is copied.

    Example:
        >>> import torch
        >>> from checkpointer.formats.snapshot import Snapshots
        >>> weights = torch.ones(2)
        >>> snapshot = Snapshots().take({"w": weights, "tied": weights, "row": weights[:1]})
        >>> _ = weights.zero_()
        >>> state = snapshot.wait()
        >>> state["row"], state["tied"] is state["w"]
        (tensor([1.]), True)
        >>> snapshot.release()
    """

    copies: int = 1
    takes_shards: bool = attrs.field(default=False, kw_only=True)
    _free: list[Memory] = attrs.field(factory=list, init=False)
    _streams: dict[Any, Any] = attrs.field(factory=dict, init=False)
    _places: _Places = attrs.field(factory=lambda: _Places(), init=False)

    def take(self, state: Any) -> Snapshot:
        """Copy a state: for CPU tensors at once, for CUDA tensors before the next operation of the current stream.

        Raises:
            SaveError: If a part of it cannot be pickled: then `torch.save` could not write it either.
        """
        memory = self._memory()
        sources, streams = Sources(), Streams(self._streams)
        try:
            with _outside_autograd():
                copy = self._copy(state, sources, memory, streams)
                events = streams.finish()
        except Exception as error:
            self._give_back(memory)
            if isinstance(error, MemoryError):
                raise
            what = culprit(state, functools.partial(pickle_dry, takes_shards=self.takes_shards))
            if not what and isinstance(error, CutStorageError):
                raise
            if not what:
                uncopied = culprit(state, self._round_trip)
                what = f"{uncopied or f'{type(error).__name__}: {error}'}, or pass background=None"
            msg = f"the state cannot be copied, which a save in the background begins with: {what}"
            raise SaveError(msg) from error
        return Snapshot(copy, memory, events, [sources] if events else [], self._give_back)

    def _copy(self, state: Any, sources: Sources, memory: Memory, streams: Streams) -> Any:
        """Return a copy of a state on a memory."""
        pickled = self._pickle(state, sources)
        if "torch" not in sys.modules:
            return pickled.load([], memory.buffer)
        if memory.matches(sources):
            state = pickled.load(memory.copy(sources, streams), memory.buffer)
            if pickled.runs_code:
                memory.forget_tensors()
            return state
        found, plain = sources.tensors, [*map(is_plain, sources.tensors)]
        sources.tensors = [tensor for tensor, is_one in zip(found, plain, strict=True) if is_one]
        others = [tensor for tensor, is_one in zip(found, plain, strict=True) if not is_one]
        pickled_others = self._pickle(others, sources, aside=False)
        self._free.clear()  # The other memories do not match either.
        memory.arrange(sources)
        copies = iter(memory.copy(sources, streams))
        other_copies = iter(pickled_others.load([], memory.buffer))
        state = pickled.load([next(copies if is_one else other_copies) for is_one in plain], memory.buffer)
        memory.check_sizes()
        if pickled.runs_code or pickled_others.runs_code:
            memory.forget_tensors()
        return state

    def _round_trip(self, state: Any) -> None:
        """Pickle a state as for a copy and load it, without copying its bytes."""
        sources = Sources()
        self._pickle(state, sources, aside=False).load([], sources.storages.__getitem__)

    def _pickle(self, state: Any, sources: Sources, *, aside: bool = True) -> _Pickled:
        stream = io.BytesIO()
        arrays: list[memoryview] = []
        pickler = _Pickler(stream, _PROTOCOL, buffer_callback=lambda buffer: _keep(buffer, arrays))
        pickler.takes_shards = self.takes_shards
        pickler.dispatch_table = _dispatch_table(sources)
        pickler.tensors, pickler.places = sources.tensors, self._places
        torch = sys.modules.get("torch")
        if aside and torch is not None:
            pickler.classes = torch.Tensor, torch.nn.Parameter
        pickler.dump(state)
        return _Pickled(stream, arrays)

    def _memory(self) -> Memory:
        # One operation, because the writer thread gives memory back at any time.
        try:
            return self._free.pop()
        except IndexError:
            return Memory()

    def _give_back(self, memory: Memory) -> None:
        if len(self._free) < self.copies:
            self._free.append(memory)


class _Pickler(Pickler):
    """Pickles a state without its tensors that have no attributes, and are not of a subclass."""

    places: _Places
    tensors: list[Any]
    """Such tensors are appended here, and their places are pickled."""
    classes: tuple[type, ...] = ()
    """The classes of tensors that are put aside."""

    def reducer_override(self, value: Any) -> Any:
        """See `Pickler.reducer_override`."""
        if type(value) in self.classes and not value.__dict__:
            tensors = self.tensors
            place = self.places[len(tensors)]
            tensors.append(value)
            return place
        return super().reducer_override(value)


class _Places(dict[int, Any]):
    """What stands in the pickle for each tensor. It is kept, because new tuples would start a garbage collection."""

    def __missing__(self, number: int) -> Any:
        self[number] = _tensor, (number,)
        return self[number]


def _dispatch_table(sources: Sources) -> Mapping[type, Any]:
    """Return how to pickle storages, as their numbers, and all else."""
    torch = sys.modules.get("torch")
    if torch is None:
        return copyreg.dispatch_table
    numbers: dict[type, Any] = {
        torch.UntypedStorage: lambda storage: (_copy_of, (sources.number_of(storage),)),
        torch.storage.TypedStorage: lambda storage: (
            _copy_of,
            (sources.number_of(storage._untyped_storage), storage.dtype),
        ),
    }
    others: dict[type, Any] = copyreg.dispatch_table
    return ChainMap(numbers, others)


@contextlib.contextmanager
def _outside_autograd() -> Iterator[None]:
    """Copy in a mode in which later copies can change the same tensors."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def _on_the_host() -> contextlib.AbstractContextManager[object]:
    """Return a context in which tensors are made on the CPU, whatever the default device is."""
    torch = sys.modules.get("torch")
    return torch.device("cpu") if torch is not None else contextlib.nullcontext()


def _noted_by_torch() -> list[Any]:
    utils: Any = getattr(sys.modules.get("torch"), "_utils", None)
    if hasattr(utils, "_get_sparse_tensors_to_validate"):  # Since torch 2.15, a list for each thread.
        return utils._get_sparse_tensors_to_validate()  # type: ignore[no-any-return]
    return getattr(utils, "_sparse_tensors_to_validate", [])


def _keep(buffer: pickle.PickleBuffer, arrays: list[memoryview]) -> bool:
    """Copy what an array offers outside of the pickle; True leaves it inside."""
    try:
        view = buffer.raw()
    except BufferError:  # Not contiguous.
        return True
    copy = memoryview(bytearray(view))
    arrays.append(copy.toreadonly() if view.readonly else copy)
    return False


@attrs.define
class _Pickled:
    """A state in pieces."""

    stream: io.BytesIO
    arrays: list[memoryview]
    runs_code: bool = attrs.field(default=False, init=False)
    """Whether `load` ran code of other packages. It may have changed tensors of the copy, or put others there."""

    def load(self, tensors: list[Any], storage: Callable[[int], Any]) -> Any:
        """Put the state together again, on copies of its tensors and storages."""
        self.stream.seek(0)
        # torch notes what a load has rebuilt, to check it later; of this nothing was read from a file.
        noted = _noted_by_torch()
        before = len(noted)
        try:
            with _on_the_host():
                unpickler = _Unpickler(self.stream, self.arrays, tensors, storage)
                state = unpickler.load()
                self.runs_code = unpickler.runs_code
                return state
        finally:
            del noted[before:]


class _Unpickler(pickle.Unpickler):
    """Puts a state together again. It reads nothing but what was pickled just now."""

    def __init__(
        self, stream: io.BytesIO, arrays: list[memoryview], tensors: list[Any], storage: Callable[[int], Any]
    ) -> None:
        super().__init__(stream, buffers=arrays)
        self.runs_code = False
        self._tensors = tensors
        self._storage = storage

    def find_class(self, module: str, name: str, /) -> Any:
        if module == __name__:
            if name == _tensor.__name__:
                return self._tensors.__getitem__
            if name == _copy_of.__name__:
                # Not a method: the memo would hold the unpickler, and in Python 3.10 it is never collected then.
                return functools.partial(_stored, self._storage)
        self.runs_code = self.runs_code or module.partition(".")[0] not in _QUIET
        found = super().find_class(module, name)
        if module == "torch._utils" and name == "_rebuild_tensor_v3":
            # It is handed an untyped storage, but a load gives it a typed one, and so it expects that.
            return lambda storage, *rest: found(_wrapped(storage), *rest)
        return found


def _tensor(number: int) -> Any:
    """Stand in the pickle for a tensor's copy; the `_Unpickler` has the copies."""
    raise AssertionError(number)


def _copy_of(number: int, dtype: Any = None) -> Any:
    """Stand in the pickle for a storage's copy, or its copy as values of a dtype; the `_Unpickler` has the copies."""
    raise AssertionError(number, dtype)


def _stored(copies: Callable[[int], Any], number: int, dtype: Any = None) -> Any:
    storage = copies(number)
    return storage if dtype is None else _wrapped(storage, dtype)


def _wrapped(storage: Any, dtype: Any = None) -> Any:
    import torch

    typed = torch.storage.TypedStorage
    return typed(wrap_storage=storage, dtype=dtype or torch.uint8, _internal=True)  # type: ignore[no-untyped-call]
