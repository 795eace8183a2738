"""Copies the tensors and storages of a state into memory that the next copy uses again.

If the next state has the same tensors (their kinds, shapes, strides, and which of them share memory), the tensors of
the copy are used again too: only bytes are copied then. Otherwise the tensors are made anew, on buffers that are kept
from the last copy as far as their sizes fit.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, Final

import attrs

from checkpointer.formats.shared_memory import LARGE, Arena, arena_for
from checkpointer.formats.tensor_bytes import move
from checkpointer.formats.tensor_storage import cut, span

UNUSED: Final = 1 << 20
"""Bytes of a storage that no tensor of the state uses, from which on they are not copied."""
_ALIGNED: Final = 16
"""Copies of a part of a storage begin at a multiple of this; a multiple of each element's size."""

_Key = tuple[int, str]
"""Bytes of a buffer, and where it is: ``"cpu"``, ``"pinned"`` or ``"meta"``."""
_address: Final = attrgetter("_cdata")


@attrs.define
class Sources:
    """The tensors and storages of one state. Each tensor and each storage is in it once."""

    tensors: list[Any] = attrs.field(factory=list)
    """Tensors without attributes, and not of a subclass."""
    storages: list[Any] = attrs.field(factory=list)
    """Storages of other values. While they are here, no other storage has their address."""
    numbers: dict[int, int] = attrs.field(factory=dict)
    """Place in ``storages`` by address."""

    def number_of(self, storage: Any) -> int:
        """Return the place of a storage in ``storages``; add it if it is new."""
        number = self.numbers.setdefault(storage._cdata, len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        return number


def is_plain(tensor: Any) -> bool:
    """Return whether shape, strides, offset and storage are all there is to a tensor (without attributes)."""
    import torch

    return (
        tensor.layout is torch.strided
        and (tensor.is_cpu or tensor.is_cuda)
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not tensor._is_zerotensor()
        and not tensor._backward_hooks  # torch warns that they are not saved.
    )


@attrs.define
class _Part:
    """The bytes of one storage that are copied."""

    number: int
    """Number of the storage: first those of `Sources.storages`, then those of the tensors."""
    tensor: int | None
    """Place of a tensor that is on the storage; None if it is in `Sources.storages`."""
    start: int
    """First byte."""
    size: int
    """Bytes."""
    place: str
    """Where the copy is, as in `_Key`."""
    fits: bool
    """Whether the tensor holds these bytes in their order, and is copied instead of them, because they are few."""


@attrs.frozen
class _Layout:
    """How the tensors of a state lie on their storages, and the copies that were made for that."""

    has_same_metadata: Comparison
    on: list[int]
    """For each tensor the number of its storage."""
    sizes: list[int]
    """For each tensor the bytes of its storage."""
    loose: list[int]
    """Places of the tensors that do not fill their storages. The others have the offset 0."""
    offsets: list[int]
    """For each of these its offset in elements."""
    others: list[_Key]
    """Bytes and device of each storage without a tensor."""
    copies: list[Any]
    """The copy of each tensor."""
    whole: list[int]
    """Places of the small tensors that are copied at once."""
    whole_copies: list[Any]
    rest: list[_Part]
    """All other parts."""


@contextlib.contextmanager
def _without_overrides() -> Iterator[None]:
    """Call torch itself for each operation: no mode, such as a default device, takes a part in it."""
    import torch

    with torch._C.DisableTorchFunction():
        yield


class Memory:
    """The buffers of one copy of a state, and the tensors on them."""

    def __init__(self) -> None:
        self._buffers: list[tuple[_Key, Any]] = []
        self._arena: Arena | None = None
        """The memory of the buffers on the CPU, if the writer process reads it."""
        self._layout: _Layout | None = None
        self._addresses: tuple[list[int], list[int]] | None = None
        """Those of the storages when they last matched: of `Sources.storages`, and of each tensor's."""

    @_without_overrides()
    def matches(self, sources: Sources) -> bool:
        """Return whether the tensors of the last copy can take the bytes of these."""
        layout = self._layout
        if layout is None or len(layout.on) != len(sources.tensors) or not layout.has_same_metadata(sources.tensors):
            return False
        if self._arena is not None and not self._arena.is_here:  # The parent of this process writes from it.
            return False
        storages = _storages_of(sources.tensors)
        if (
            layout.others != [_key_of(storage) for storage in sources.storages]
            or layout.sizes != _sizes_of(storages)
            or layout.offsets != [sources.tensors[place].storage_offset() for place in layout.loose]
        ):
            return False
        addresses = [*sources.numbers], [*map(_address, storages)]
        # At the same addresses, the same tensors share memory.
        if addresses != self._addresses and layout.on != _numbered(storages, sources):
            return False
        self._addresses = addresses
        return True

    @_without_overrides()
    def arrange(self, sources: Sources) -> None:
        """Make tensors and buffers for these sources. All tensors must be plain."""
        self._layout = self._addresses = None  # Before new memory is allocated, free what does not fit.
        tensors, storages = sources.tensors, _storages_of(sources.tensors)
        on = _numbered(storages, sources)
        parts = [*_whole_storages(sources), *_parts(tensors, storages, on, len(sources.storages))]
        keys = [(part.size, part.place) for part in parts]
        self._allocate(keys)
        starts = {part.number: part.start for part in parts}
        copies = [_on(self.buffer(n), tensor, starts[n]) for n, tensor in zip(on, tensors, strict=True)]
        whole = [part.tensor for part in parts if part.fits and part.tensor is not None]
        sizes = _sizes_of(storages)
        loose = [n for n, tensor in enumerate(tensors) if not _fits(tensor, 0, sizes[n])]
        self._layout = _Layout(
            has_same_metadata=compared_by_torch(tensors) or compared_in_python(tensors),
            on=on,
            sizes=sizes,
            loose=loose,
            offsets=[tensors[place].storage_offset() for place in loose],
            others=[_key_of(storage) for storage in sources.storages],
            copies=copies,
            whole=whole,
            whole_copies=[copies[place] for place in whole],
            rest=[part for part in parts if part.size and not part.fits],
        )

    def _allocate(self, keys: Sequence[_Key]) -> None:
        """Make the buffers: those on the CPU in shared memory, if they are large enough together."""
        sizes = [size for size, place in keys if place == "cpu"]
        has_changed = self._arena is not None
        if self._arena is not None:
            self._buffers = [(key, buffer) for key, buffer in self._buffers if key[1] != "cpu"]
            self._arena = self._arena if self._arena.suits(sizes) else None
        self._arena = self._arena or arena_for(sizes, has_changed=has_changed)
        if self._arena is None:
            self._buffers = _allocate_again(keys, self._buffers)
            return
        shared = iter(self._arena.buffers(sizes))
        others = iter(_allocate_again([key for key in keys if key[1] != "cpu"], self._buffers))
        self._buffers = [(key, next(shared)) if key[1] == "cpu" else next(others) for key in keys]

    @_without_overrides()
    def copy(self, sources: Sources, streams: Streams) -> list[Any]:
        """Copy the bytes of sources that match; return the copies of the tensors."""
        import torch

        layout, tensors = self._layout, sources.tensors
        assert layout is not None, "arranged before"
        if layout.whole:
            every = len(layout.whole) == len(tensors)
            # One call, which releases the GIL once.
            torch._foreach_copy_(layout.whole_copies, tensors if every else [tensors[place] for place in layout.whole])
        moves, owners = [], []
        for part in layout.rest:
            if part.place == "meta":
                continue
            storage, buffer = _source_of(part, sources), self.buffer(part.number)
            if storage.device.type == "cpu":
                moves.append((buffer.data_ptr(), storage.data_ptr() + part.start, part.size))
                owners.append((buffer, storage))
                continue
            source = _bytes_of(storage, part.start, part.size)
            with streams.of(storage.device):
                _bytes_of(buffer, 0, part.size).copy_(source, non_blocking=part.place == "pinned")
        move(moves, owners)
        return layout.copies

    def forget_tensors(self) -> None:
        """Make new tensors for the next copy. The buffers stay."""
        self._layout = self._addresses = None

    def check_sizes(self) -> None:
        """Raise `SaveError` if a tensor has needed more bytes than its storage has: torch enlarges a buffer then."""
        for (size, _), buffer in self._buffers:
            if buffer.nbytes() != size:
                raise cut(buffer.nbytes(), size)

    def buffer(self, number: int) -> Any:
        """Return the copy of a storage."""
        return self._buffers[number][1]


class Streams:
    """The streams of one copy: one for each CUDA device, which begins after what the current stream has to do."""

    def __init__(self, kept: dict[Any, Any]) -> None:
        self._kept = kept
        self._used: dict[Any, Any] = {}

    def of(self, device: Any) -> Any:
        """Return a context in which copies from a device are queued; for the CPU it changes nothing."""
        import torch

        if device.type != "cuda":
            return contextlib.nullcontext()  # `torch.cuda.stream` would initialise CUDA.
        if device not in self._used:
            if device not in self._kept:
                self._kept[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._used[device] = self._kept[device]
            self._used[device].wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._used[device])

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


# Metadata


Comparison = Callable[[Sequence[Any]], bool]
"""Says whether as many tensors have the same classes, dtypes, devices, shapes and strides; then they are plain too."""


def compared_by_torch(tensors: Sequence[Any]) -> Comparison | None:
    """Return a comparison with plain tensors in C++, which is private to torch; None if torch does not offer it."""
    import torch

    dynamo: Any = getattr(torch._C, "_dynamo", None)
    try:
        guards = dynamo.guards.TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.size()) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        )
        return (lambda others: guards.check(*others)) if guards.check(*tensors) else None
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def compared_in_python(tensors: Sequence[Any]) -> Comparison:
    """Return a comparison with plain tensors that needs nothing private. It takes many times as long."""
    described = [*map(_described, tensors)]
    return lambda others: described == [*map(_described, others)]


def _described(tensor: Any) -> tuple[Any, ...]:
    is_same = type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, is_plain(tensor)
    return (*is_same, tensor.size(), tensor.stride())


def _storages_of(tensors: Sequence[Any]) -> list[Any]:
    import torch

    return [*map(torch.Tensor.untyped_storage, tensors)]


def _sizes_of(storages: Sequence[Any]) -> list[int]:
    import torch

    return [*map(torch.UntypedStorage.nbytes, storages)]


def _numbered(storages: Sequence[Any], sources: Sources) -> list[int]:
    """Return for each storage its number: those that `Sources.storages` has too have their place there."""
    numbers = dict(sources.numbers)
    return [numbers.setdefault(address, len(numbers)) for address in map(_address, storages)]


def _key_of(storage: Any) -> _Key:
    return storage.nbytes(), str(storage.device)


# Parts


def _whole_storages(sources: Sources) -> Iterator[_Part]:
    for number, storage in enumerate(sources.storages):
        place = {"cuda": "pinned", "meta": "meta"}.get(storage.device.type, "cpu")
        yield _Part(number, None, 0, storage.nbytes(), place, fits=False)


def _parts(tensors: Sequence[Any], storages: Sequence[Any], on: Sequence[int], first: int) -> Iterator[_Part]:
    """Return the part of each storage, from the number ``first`` on, that the tensors use."""
    import torch

    places = defaultdict(list)
    for place, number in enumerate(on):
        if number >= first:
            places[number].append(place)
    for number, among in places.items():
        place, size = among[0], storages[among[0]].nbytes()
        start, is_cuda = 0, tensors[place].is_cuda
        fits = _fits(tensors[place], 0, size)
        if not fits:
            start, size = _used([tensors[other] for other in among], size)
            fitting = (other for other in among if _fits(tensors[other], start, size))
            place = next(fitting, place)
            fits = _fits(tensors[place], start, size)
        # A copy of bool values would change bytes other than 0 and 1.
        fits = fits and size < LARGE and not is_cuda and tensors[place].dtype is not torch.bool
        yield _Part(number, place, start, size, "pinned" if is_cuda else "cpu", fits=fits)


def _used(tensors: Sequence[Any], size: int) -> tuple[int, int]:
    """Return where the bytes begin that the tensors use, and their number; all if it makes little difference."""
    spans = [span(tensor) for tensor in tensors if tensor.numel()]
    start = min((first for first, _ in spans), default=0) // _ALIGNED * _ALIGNED
    end = max((last for _, last in spans), default=0)
    if end > size:
        raise cut(end, size)
    return (start, end - start) if size - (end - start) >= UNUSED else (0, size)


def _fits(tensor: Any, start: int, size: int) -> bool:
    covers = tensor.storage_offset() * tensor.itemsize == start and tensor.numel() * tensor.itemsize == size
    return bool(size) and covers and tensor.is_contiguous()


def _source_of(part: _Part, sources: Sources) -> Any:
    if part.tensor is None:
        return sources.storages[part.number]
    return sources.tensors[part.tensor].untyped_storage()


# Buffers


def _allocate_again(keys: Sequence[_Key], kept: list[tuple[_Key, Any]]) -> list[tuple[_Key, Any]]:
    """Return a buffer for each key; those that are kept already are used again, if their keys are the same."""
    free = defaultdict(list)
    while kept:
        key, buffer = kept.pop()
        if buffer.nbytes() == key[0]:
            free[key].append(buffer)
    again = [(key, free[key].pop() if free[key] else None) for key in keys]
    free.clear()
    return [(key, _allocate(key) if buffer is None else buffer) for key, buffer in again]


def _allocate(key: _Key) -> Any:
    import torch

    size, place = key
    device = "meta" if place == "meta" else "cpu"
    return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=place == "pinned").untyped_storage()


def _on(buffer: Any, tensor: Any, start: int) -> Any:
    """Return a tensor like ``tensor``, on a buffer that holds the bytes of its storage from ``start`` on."""
    import torch

    offset = max(0, tensor.storage_offset() - start // tensor.itemsize)
    if not tensor.numel():
        offset = min(offset, buffer.nbytes() // tensor.itemsize)
    copy = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(buffer, offset, tensor.size(), tensor.stride())
    if type(tensor) is torch.nn.Parameter:
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)


def _bytes_of(storage: Any, start: int, size: int) -> Any:
    """Return bytes of a storage as a tensor; of eight bytes each, if possible, because they are copied faster."""
    import torch

    unit, dtype = (1, torch.uint8) if (start | size) % 8 else (8, torch.int64)
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, start // unit, (size // unit,), (1,))
