"""Pickles a state by value, as `torch.save` does: a payload holds every byte that a restore needs, or it is refused.

Two kinds of tensors pickle less than their bytes. A memory-mapped tensor (of ``tensordict``, for example) pickles the
path of its file, so what the training writes to that file later would show in the checkpoint. A DTensor pickles the
shard of this process alone.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from checkpointer.errors import SaveError
from checkpointer.formats.tensor_storage import CutStorageError, check_stored

HOW_TO_SAVE_SHARDS: Final = (
    'save with DistributedManager(format="dcp"), or return whole tensors: get_state_dict(model, optimizers, '
    "options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of torch.distributed.checkpoint.state_dict, on "
    "all ranks"
)
_ONE_PART: Final = f"hold parts of, and this checkpoint would hold one part alone; {HOW_TO_SAVE_SHARDS}"
_PROTOCOL: Final = 2
_ITEMS: Final = (list, tuple, set, frozenset, deque)


class Pickler(pickle.Pickler):
    """Pickles tensors with their bytes, even if their class pickles something else."""

    takes_shards = False
    """Whether a DTensor of which other processes hold a part is pickled."""

    def reducer_override(self, value: Any) -> Any:
        """Return what pickles a tensor by value; NotImplemented if its class does so already."""
        plain = by_value(value, takes_shards=self.takes_shards)
        return NotImplemented if plain is value else plain.__reduce_ex__(_PROTOCOL)


class ByValue:
    """Stands in for the pickle module in `torch.save`."""

    Pickler = Pickler


def by_value(value: Any, *, takes_shards: bool = False) -> Any:
    """Return ``value``, or a plain tensor on the same memory if its class pickles a reference to that memory.

    Raises:
        SaveError: If other processes hold parts of a tensor, or its storage was freed or cut.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        check_stored(value)
        return value
    (check_summed if takes_shards else check_whole)(value)
    check_stored(value)
    if not _is_reference(value):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


class ShardError(SaveError):
    """A tensor is a shard; the message goes on after the tensor's path and class."""


def check_whole(tensor: Any, path: str = "") -> None:
    """Raise if other processes hold parts of a tensor, as of a DTensor or a ShardedTensor."""
    if is_shard(tensor):
        _refuse(tensor, path, _ONE_PART)


def check_summed(tensor: Any, path: str = "") -> None:
    """Raise if each process holds a summand of a DTensor: shards can be put together, and summands are not shards."""
    if is_dtensor(tensor) and any(placed.is_partial() for _, placed in _spread(tensor)):
        _refuse(tensor, path, "hold summands of (Partial), and a checkpoint would hold one; call redistribute() first")


def _refuse(tensor: Any, path: str, why: str) -> None:
    msg = f"that other processes {why}"
    if not path:
        raise ShardError(msg)
    named = f"{path} is a {class_name(tensor)} {msg}"
    raise SaveError(named)


def is_whole_dtensor(tensor: Any) -> bool:
    """Return whether this is a DTensor of which this process holds all."""
    return is_dtensor(tensor) and not is_shard(tensor)


def is_dtensor(tensor: Any) -> bool:
    """Return whether this is a DTensor. It does not import torch's class."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_shard(tensor: Any) -> bool:
    """Return whether other processes hold parts of a tensor that this process does not hold."""
    if not is_dtensor(tensor):
        return hasattr(tensor, "local_shards")  # A ShardedTensor, as FSDP1 makes them.
    # A process outside of the mesh holds none of the tensor.
    return tensor.device_mesh.get_coordinate() is None or bool(_spread(tensor))


def _spread(tensor: Any) -> list[tuple[int, Any]]:
    """Return the dimensions of the mesh along which the processes hold different things, with the placements there."""
    mesh = tensor.device_mesh
    return [
        (axis, placed)
        for axis, placed in enumerate(tensor.placements)
        if mesh.size(axis) > 1 and not placed.is_replicate()
    ]


def _is_reference(tensor: Any) -> bool:
    """Return whether a tensor's class pickles something else than the tensor's memory, such as the path of a file."""
    import torch

    own: Any = type(tensor).__reduce_ex__
    if own is torch.Tensor.__reduce_ex__:
        return False
    try:
        has_bytes = bool(tensor.untyped_storage().nbytes())
    except Exception:  # It has none, or it is in other tensors. Classes raise what they like here.
        return False
    dry = _Dry()
    try:
        dry.dump(tensor)
    except Exception:
        return has_bytes
    return has_bytes and not dry.names_memory


class _Dry(pickle.Pickler):
    """Pickles all but the bytes of tensors, to see what would happen."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), _PROTOCOL)
        self.names_memory = False

    def persistent_id(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.storage.TypedStorage):
            # Fails for a dtype that a torch file cannot hold.
            value._pickle_storage_type()  # type: ignore[no-untyped-call]
        elif not torch.is_storage(value):
            return None
        self.names_memory = True
        return "memory"


class _DryByValue(_Dry, Pickler):
    """Pickles all but the bytes of tensors, as `Pickler` would."""


def pickle_dry(value: Any, *, takes_shards: bool = False) -> None:
    """Raise what pickling ``value`` by value would raise."""
    dry = _DryByValue()
    dry.takes_shards = takes_shards
    dry.dump(value)


def culprit(state: Any, attempt: Callable[[Any], object] = pickle_dry, path: str = "state") -> str:
    """Return which part of a state ``attempt`` fails for, why, and what to do; empty if each part alone is fine.

    ``path`` is the name of the state itself.

    Example:
        >>> import threading
        >>> from checkpointer.formats.pickler import culprit
        >>> culprit({"model": {"lock": threading.Lock()}}).partition(";")[0]
        "state['model']['lock'] is a _thread.lock (TypeError: cannot pickle '_thread.lock' object)"
    """
    value, found = state, _error(state, attempt)
    visited: set[int] = set()
    while found is not None and id(value) not in visited:
        visited.add(id(value))
        for step, part in _parts(value):
            error = _error(part, attempt)
            if error is not None:
                path, value, found = path + step, part, error
                break
    if found is None or value is state:
        return ""
    what = f"{path} is a {class_name(value)}"
    if isinstance(found, ShardError):
        return f"{what} {found}"
    if isinstance(found, CutStorageError):
        return f"{path}: {found}"
    return f"{what} ({type(found).__name__}: {found}); leave it out of the state, or save what it holds"


def refuse_shards_in(value: Any, path: str, why: str = _ONE_PART) -> None:
    """Raise `SaveError` if pickling a value would pickle a shard, however deep in it; ``path`` is its name."""

    def attempt(part: Any) -> None:
        try:
            pickle_dry(part)
        except ShardError:
            msg = f"that other processes {why}"
            raise ShardError(msg) from None
        except Exception:  # It is not about shards. What pickles the value raises it.
            return

    try:
        attempt(value)
    except ShardError as error:
        msg = culprit(value, attempt, path) or f"{path} is a {class_name(value)} with a tensor {error}"
        raise SaveError(msg) from None


def class_name(value: Any) -> str:
    """Return the full name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _error(value: Any, attempt: Callable[[Any], object]) -> Exception | None:
    try:
        attempt(value)
    except Exception as error:
        return error
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f" (key {key!r})", key
            yield f"[{key!r}]", item
    elif isinstance(value, _ITEMS):
        yield from ((f"[{number}]", item) for number, item in enumerate(value))
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from ((f".{name}", item) for name, item in attributes.items())
