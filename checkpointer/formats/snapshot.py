"""Copies a state into host memory that is used again, so that a later write sees the state of now.

A state is taken apart as `torch.save` does it, by pickling: so views, strides, shared storages, tied weights and
everything else that a payload would hold come out as they went in, and what it would not hold fails here already.
Only the storages, where the bytes are, do not go through the pickle: each is copied once, into a buffer of its size.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from checkpointer.errors import SaveError
from checkpointer.formats.pickler import Pickler, culprit

__all__ = ["Snapshot", "Snapshots"]

_PROTOCOL: Final = 5
_Key = tuple[int, bool]
"""Bytes of a buffer, and whether it is pinned."""


@attrs.define
class Snapshot:
    """One copy of a state, until it is released."""

    state: Any
    """The copy. On CUDA it is whole only after `wait`."""
    _buffers: list[tuple[_Key, Any]]
    _events: list[Any]
    _sources: list[Any]
    """Storages that are being copied: their memory must not be freed before."""
    _give_back: Callable[[list[tuple[_Key, Any]]], None]

    def wait(self) -> Any:
        """Return the state, once all of it is there. For the thread that writes it."""
        for event in self._events:
            event.synchronize()
        self._events, self._sources = [], []
        return self.state

    def release(self) -> None:
        """Give the buffers back for the next snapshot: the state must not be used any more. Twice does nothing."""
        buffers, self.state, self._buffers = self._buffers, None, []
        self._events, self._sources = [], []
        self._give_back(buffers)


@attrs.define
class Snapshots:
    """Takes snapshots, one after the other, into the same memory.

    Args:
        copies: How many may be alive at a time; as many buffers of each size are kept.
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
    _free: dict[_Key, list[Any]] = attrs.field(factory=dict, init=False)
    _streams: dict[Any, Any] = attrs.field(factory=dict, init=False)

    def take(self, state: Any) -> Snapshot:
        """Copy a state: for CPU tensors at once, for CUDA tensors before the next operation of the current stream.

        Raises:
            SaveError: If a part of it cannot be pickled: then `torch.save` could not write it either.
        """
        copying = _Copying(self._buffer, self._stream)
        try:
            copy = self._round_trip(state, copying)
            events = copying.finish()
        except Exception as error:
            self._give_back(copying.buffers)
            if isinstance(error, MemoryError):
                raise
            what = culprit(state)
            if not what:
                uncopied = culprit(state, lambda part: self._round_trip(part, _Numbering()))
                what = f"{uncopied or f'{type(error).__name__}: {error}'}, or pass background=None"
            msg = f"the state cannot be copied, which a save in the background begins with: {what}"
            raise SaveError(msg) from error
        self._trim(Counter(key for key, _ in copying.buffers))
        sources = list(copying.sources.values()) if events else []
        return Snapshot(copy, copying.buffers, events, sources, self._give_back)

    def _round_trip(self, state: Any, copying: _Numbering) -> Any:
        stream = io.BytesIO()
        arrays: list[memoryview] = []
        pickler = Pickler(stream, _PROTOCOL, buffer_callback=lambda buffer: _keep(buffer, arrays))
        pickler.takes_shards = self.takes_shards
        pickler.dispatch_table = copying.dispatch_table()
        pickler.dump(state)
        stream.seek(0)
        # torch notes what a load has rebuilt, to check it later; of this nothing was read from a file.
        noted = _noted_by_torch()
        before = len(noted)
        try:
            return _Unpickler(stream, copying.copies, arrays).load()
        finally:
            del noted[before:]

    def _buffer(self, key: _Key) -> Any:
        # One operation, because the writer thread gives buffers back at any time.
        free = self._free.get(key)
        try:
            return free.pop() if free else _allocate(key)
        except IndexError:
            return _allocate(key)

    def _give_back(self, buffers: list[tuple[_Key, Any]]) -> None:
        for key, buffer in buffers:
            self._free.setdefault(key, []).append(buffer)

    def _trim(self, used: Counter[_Key]) -> None:
        """Free the buffers that such a state does not need."""
        for key in list(self._free):
            del self._free[key][used[key] * (self.copies - 1) :]
            if not self._free[key]:
                del self._free[key]

    def _stream(self, device: Any) -> Any:
        import torch

        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


class _Numbering:
    """The storages of one state, by number. They are not copied, which is enough to try whether a state can be."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self.sources: dict[int, Any] = {}
        self.copies: list[Any] = []

    def number_of(self, storage: Any) -> int:
        """Return the number of a storage's copy; one that many tensors share is copied once."""
        identity = storage._cdata
        if identity not in self._numbers:
            self.sources[identity] = storage  # While it exists, no other has its address.
            self._numbers[identity] = len(self.copies)
            self.copies.append(self._copy(storage))
        return self._numbers[identity]

    def dispatch_table(self) -> Mapping[type, Any]:
        """Return how to pickle storages, as their numbers, and all else."""
        torch = sys.modules.get("torch")
        if torch is None:
            return copyreg.dispatch_table
        numbers: dict[type, Any] = {
            torch.UntypedStorage: lambda storage: (_copy_of, (self.number_of(storage),)),
            torch.storage.TypedStorage: lambda storage: (
                _copy_of,
                (self.number_of(storage._untyped_storage), storage.dtype),
            ),
        }
        others: dict[type, Any] = copyreg.dispatch_table
        return ChainMap(numbers, others)

    def _copy(self, storage: Any) -> Any:
        return storage


class _Copying(_Numbering):
    """The storages of one state on their way into buffers."""

    def __init__(self, buffer: Callable[[_Key], Any], stream: Callable[[Any], Any]) -> None:
        super().__init__()
        self._buffer = buffer
        self._stream = stream
        self._used: dict[Any, Any] = {}
        self.buffers: list[tuple[_Key, Any]] = []

    def _copy(self, storage: Any) -> Any:
        import torch

        if storage.device.type == "meta":
            return torch.UntypedStorage(storage.nbytes(), device="meta")  # type: ignore[no-untyped-call]
        is_cuda = storage.device.type == "cuda"
        key = storage.nbytes(), is_cuda
        buffer = self._buffer(key)
        self.buffers.append((key, buffer))
        if not storage.nbytes():
            return buffer
        if not is_cuda:
            _bytes_of(buffer).copy_(_bytes_of(storage))
            return buffer
        with torch.cuda.stream(self._stream_for(storage.device)):
            _bytes_of(buffer).copy_(_bytes_of(storage), non_blocking=True)
        return buffer

    def _stream_for(self, device: Any) -> Any:
        import torch

        if device not in self._used:
            stream = self._used[device] = self._stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
        return self._used[device]

    def finish(self) -> list[Any]:
        """Let the current streams wait for the copies, not this thread; return the events that say when they end."""
        if not self._used:
            return []
        import torch

        events = []
        for device, stream in self._used.items():
            events.append(stream.record_event())
            torch.cuda.current_stream(device).wait_event(events[-1])
        return events


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


class _Unpickler(pickle.Unpickler):
    """Puts a state together again, on the copies of its storages. It reads nothing but what was pickled just now."""

    def __init__(self, stream: io.BytesIO, copies: list[Any], arrays: list[memoryview]) -> None:
        super().__init__(stream, buffers=arrays)
        self._copies = copies

    def find_class(self, module: str, name: str, /) -> Any:
        if module == __name__ and name == _copy_of.__name__:
            return self._copy_of
        found = super().find_class(module, name)
        if module == "torch._utils" and name == "_rebuild_tensor_v3":
            # It is handed an untyped storage, but a load gives it a typed one, and so it expects that.
            return lambda storage, *rest: found(_wrapped(storage), *rest)
        return found

    def _copy_of(self, number: int, dtype: Any = None) -> Any:
        return self._copies[number] if dtype is None else _wrapped(self._copies[number], dtype)


def _copy_of(number: int, dtype: Any = None) -> Any:
    """Stand in the pickle for a storage's copy, or its copy as values of a dtype; the `_Unpickler` has the copies."""
    raise AssertionError(number, dtype)


def _wrapped(storage: Any, dtype: Any = None) -> Any:
    import torch

    typed = torch.storage.TypedStorage
    return typed(wrap_storage=storage, dtype=dtype or torch.uint8, _internal=True)  # type: ignore[no-untyped-call]


def _allocate(key: _Key) -> Any:
    import torch

    size, pinned = key
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()


def _bytes_of(storage: Any) -> Any:
    import torch

    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
