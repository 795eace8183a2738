"""The torch file: what ``torch.save`` writes and plain ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final

from checkpointer.errors import CorruptError, UnsafePayloadError
from checkpointer.ports import Writable

__all__ = ["TorchFormat"]

_PLAIN: Final = (str, int, float, bool, complex, bytes, type(None))
_CONTAINERS: Final = (dict, list, tuple, set)


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
        """See `Format.write`: torch hands each tensor's memory to the stream as it is, without a copy."""
        import torch

        torch.save(state, stream)  # type: ignore[arg-type]

    def read(self, stream: BinaryIO, *, weights_only: bool, map_location: Any) -> Any:
        """See `Format.read`.

        Raises:
            UnsafePayloadError: If ``weights_only`` refuses something in it.
            CorruptError: If it is no torch file.
        """
        import torch

        try:
            return torch.load(stream, map_location=map_location, weights_only=weights_only)
        except pickle.UnpicklingError as error:
            stream.seek(0)
            refused = _refused_globals(stream)
            if not (weights_only and refused):
                msg = f"the payload is no torch file that can be read: {error}"
                raise CorruptError(msg) from error
            msg = (
                f"the payload holds {', '.join(refused)}, which a safe load refuses to unpickle; if you trust whoever "
                "wrote it, pass weights_only=False, or allow the class with torch.serialization.add_safe_globals"
            )
            raise UnsafePayloadError(msg) from error
        except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, ImportError) as error:
            msg = f"the payload cannot be read as a torch file: {error}"
            raise CorruptError(msg) from error

    def refused(self, state: Any) -> Mapping[str, str]:
        """See `Format.refused`: asks torch itself about every leaf that is neither a tensor nor plain data."""
        return dict(_walk(state, "state", set()))


def _walk(value: Any, path: str, open_containers: set[int]) -> Iterator[tuple[str, str]]:
    import torch

    if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
        return
    if type(value) in _PLAIN or type(value) in (torch.Size, torch.dtype, torch.device):
        return
    if not isinstance(value, _CONTAINERS):
        if _asks_for_code(value):
            yield path, _type_name(value)
        return
    if id(value) in open_containers:
        return
    if type(value) not in _CONTAINERS and _asks_for_code(type(value)()):
        yield path, _type_name(value)
        return
    inner = open_containers | {id(value)}
    for key, item in _items(value):
        yield from _walk(item, f"{path}[{key}]", inner)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield repr(key), item
    else:
        for number, item in enumerate(value):
            yield str(number), item


def _asks_for_code(value: Any) -> bool:
    """Return whether a safe load of this value alone would refuse it."""
    import torch

    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception:  # What cannot even be pickled will be an error of the save itself.
        return True
    buffer.seek(0)
    return bool(_refused_globals(buffer))


def _refused_globals(stream: BinaryIO) -> list[str]:
    import torch

    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(stream))
    except Exception:  # Not a torch file at all: then nothing in it can be named.
        return []


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
