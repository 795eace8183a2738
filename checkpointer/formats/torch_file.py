"""The torch file: what ``torch.save`` writes and plain ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

import copyreg
import io
import pickle
import types
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, BinaryIO, Final

from checkpointer.errors import SaveError
from checkpointer.formats import archive
from checkpointer.formats.inspection.torch_file import check_sound
from checkpointer.formats.pickler import ByValue, by_value, check_whole, class_name, culprit
from checkpointer.formats.torch_load_errors import raising_unreadable, reason_of, unsafe_globals
from checkpointer.ports import Writable

_CONTAINERS: Final = (dict, list, tuple, set)
# The containers that a safe load builds, with any content.
_SAFE_CONTAINERS: Final = frozenset({dict, list, tuple, set, OrderedDict, Counter})
# A pickle gives larger integers four bytes for their length, and a safe load knows no such instruction.
_MAX_INT: Final = 1 << (255 * 8 - 1)
# Values that are refused although others of the same class are not.
_DETAILS: Final[Mapping[type, str]] = {int: " of 2040 bits or more", bytes: " without content"}


class TorchFormat:
    """Writes and reads torch files. torch itself is imported when a state is first written or read.

    Example:
        >>> import io, torch
        >>> from checkpointer.formats import open_format
        >>> stream = io.BytesIO()
        >>> open_format("torch").write({"w": torch.ones(2)}, stream)
        >>> torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
        {'w': tensor([1., 1.])}
    """

    name = "torch"
    extension = ".ckpt"

    def write(self, state: Any, stream: Writable) -> None:
        """See `Format.write`: the stream gets each tensor's memory in chunks, without a copy.

        Raises:
            SaveError: If a part of the state cannot be pickled, or is a shard; it says which.
        """
        import torch

        try:
            if archive.is_like_torch():
                archive.save(state, stream, ByValue)
            else:
                torch.save(state, stream, pickle_module=ByValue)  # type: ignore[arg-type]
        except (OSError, MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            what = culprit(state)
            if not what:
                raise
            msg = f"the state cannot be written: {what}"
            raise SaveError(msg) from error

    def read(self, stream: BinaryIO, *, weights_only: bool, map_location: Any) -> Any:
        """See `Format.read`. Errors of the disk or of memory say nothing about the payload and pass unchanged.

        Raises:
            UnsafePayloadError: If ``weights_only`` refuses something in it.
            CorruptError: If it is not a torch file.
        """
        start = stream.tell()
        return self._load(stream, stream, start, map_location=map_location, weights_only=weights_only)

    def read_mapped(self, path: str, *, weights_only: bool, map_location: Any) -> Any:
        """See `SupportsMapping.read_mapped`; only zip files can be mapped, others are read. Errors as for `read`."""
        with open(path, "rb") as stream:
            mapped = stream.read(4) == b"PK\x03\x04"
            stream.seek(0)
            source = path if mapped else stream
            return self._load(source, stream, 0, mmap=mapped, map_location=map_location, weights_only=weights_only)

    def _load(self, source: Any, stream: BinaryIO, start: int, *, weights_only: bool, **options: Any) -> Any:
        """Load from ``source``; ``stream`` has the same bytes, to find out from what went wrong."""
        import torch

        with raising_unreadable(lambda: stream, start, weights_only=weights_only):
            if weights_only and not start:
                check_sound(stream)
            return torch.load(source, weights_only=weights_only, **options)

    def refused(self, state: Any) -> Mapping[str, str]:
        """See `Format.refused`: asks torch itself about every value that is neither a tensor nor plain data.

        A refused key is named ``state['ids'] (key 3)``, an attribute of a tensor as ``state['w'].note``.

        Raises:
            SaveError: If a tensor is a shard, whose other parts this process does not have.
        """
        search = _Search()
        search.visit(state, "state")
        return search.found


class _Search:
    """Looks for what a safe load refuses. Tensors are not copied for it, except those of a class of the user's own."""

    def __init__(self) -> None:
        import torch

        self.found: dict[str, str] = {}
        self._tensors: Final = frozenset({torch.Tensor, torch.nn.Parameter})
        self._plain: Final = frozenset(
            {str, int, float, bool, complex, bytes, type(None), torch.Size, torch.dtype, torch.device}
        )
        self._visited: set[int] = set()
        self._open: set[int] = set()
        """Containers that are being looked into."""
        self._verdicts: dict[Any, bool] = {}
        """By what a verdict holds for: a class, or a numpy class and its dtype."""

    def visit(self, value: Any, path: str) -> None:
        """Add what is refused in ``value``."""
        if self._is_fine(value):
            return
        before = len(self.found)
        if isinstance(value, _CONTAINERS):
            if id(value) in self._visited:  # A cycle, or named under another path.
                if id(value) in self._open and isinstance(value, tuple):
                    self.found[path] = f"{class_name(value)} that holds itself"
                return
            self._visited.add(id(value))
            self._open.add(id(value))
            self._visit_items(value, path)
            self._open.discard(id(value))
        if type(value) in _SAFE_CONTAINERS or (type(value) in self._tensors and not value.is_nested):
            # torch pickles these with their attributes: OrderedDict._metadata, or a note on a parameter.
            for name, item in getattr(value, "__dict__", {}).items():
                self.visit(item, f"{path}.{name}")
        elif len(self.found) == before:
            check_whole(value, path)
            if self._is_refused(value):
                detail = " that is nested" if type(value) in self._tensors else _DETAILS.get(type(value), "")
                self.found[path] = class_name(value) + detail

    def _visit_items(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            for number, item in enumerate(value):
                if not self._is_fine(item):
                    self.visit(item, f"{path}[{number}]")
            return
        for key, item in value.items():
            if not self._is_fine(key):
                self.visit(key, f"{path} (key {key!r})")
            if not self._is_fine(item):
                self.visit(item, f"{path}[{key!r}]")

    def _is_fine(self, value: Any) -> bool:
        kind = type(value)
        if kind is int:
            return -_MAX_INT <= value < _MAX_INT  # type: ignore[no-any-return]
        if kind is bytes:
            return bool(value)  # Without content its pickle names the class, which is refused.
        # torch 2.15 and newer refuse a nested tensor.
        return kind in self._plain or (kind in self._tensors and not value.__dict__ and not value.is_nested)

    def _is_refused(self, value: Any) -> bool:
        kind = type(value)
        if kind in self._verdicts:
            return True
        sample, key = _sample(value)
        if key in self._verdicts:
            return self._verdicts[key]
        unsafe = _unsafe_alone(sample)
        if key is not None:
            self._verdicts[key] = bool(unsafe)
        elif f"{kind.__module__}.{kind.__qualname__}" in unsafe and _always_names_its_class(value):
            self._verdicts[kind] = True
        return bool(unsafe)


def _sample(value: Any) -> tuple[Any, Hashable | None]:
    """Return something small that a safe load judges as it does ``value``, and what else that verdict holds for."""
    dtype = getattr(value, "dtype", None)
    if type(value).__module__ != "numpy" or dtype is None or dtype.hasobject:
        return value, None
    return (value[:0] if value.ndim else value), (type(value), dtype)


def _always_names_its_class(value: Any) -> bool:
    """Return whether every pickle of such an object names its class: then one refusal holds for all of them."""
    import torch

    kind: Any = type(value)
    return (
        not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType))
        and kind.__reduce_ex__ in (object.__reduce_ex__, torch.Tensor.__reduce_ex__)
        and kind.__reduce__ is object.__reduce__
        and kind not in copyreg.dispatch_table
    )


class _Skeleton:
    """Stands in for the pickle module: writes what `pickle` does, with a number for each plain tensor."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            import torch

            plain = type(by_value(value)) in (torch.Tensor, torch.nn.Parameter)
            return (complex, ()) if plain and not value.is_nested else NotImplemented


def _unsafe_alone(value: Any) -> list[str]:
    """Return what a safe load of this value alone would refuse."""
    import torch

    buffer = io.BytesIO()
    try:
        torch.save(value, buffer, pickle_module=_Skeleton)
    except Exception as error:  # If it cannot be pickled, the save itself fails.
        return [str(error) or type(error).__name__]
    buffer.seek(0)
    if names := unsafe_globals(buffer):
        return names
    # It names nothing that is not allowed; and still torch fills no defaultdict, even if that class is allowed.
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        return [reason_of(error)]
    except Exception:  # Not a refusal: the skeleton has numbers where the value's own code wants tensors.
        return []
    return []
