"""safetensors: a flat mapping of names to tensors, that no reader can be made to run code with."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final

from checkpointer.errors import CorruptError, SaveError
from checkpointer.formats.inspection.safetensors_file import SafetensorsContents, entry, write_safetensors
from checkpointer.formats.inspection.tensors import TensorInfo
from checkpointer.formats.pickler import check_whole, class_name, is_whole_dtensor
from checkpointer.formats.tensor_storage import check_stored
from checkpointer.ports import Writable

try:
    from safetensors.torch import load_file as _load_file
except ImportError as error:
    msg = "format='safetensors' needs one more package: pip install 'torch-checkpointer[safetensors]'"
    raise ImportError(msg) from error

import torch

_ALWAYS: Final = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    }
)
"""Dtypes that every version of safetensors holds."""
_ADVICE: Final = "pass weights=model.state_dict with contents='weights', or use format='torch'"


class SafetensorsFormat:
    """Writes and reads safetensors. Tied tensors are written once per name.

    The writer of the package needs a path or a copy, so the file is written here.

    Example:
        >>> import io, torch
        >>> from checkpointer.formats import open_format
        >>> stream = io.BytesIO()
        >>> open_format("safetensors").write({"w": torch.ones(2)}, stream)
        >>> import safetensors.torch
        >>> safetensors.torch.load(stream.getvalue())
        {'w': tensor([1., 1.])}
    """

    name = "safetensors"
    extension = ".safetensors"

    def write(self, state: Any, stream: Writable) -> None:
        """See `Format.write`.

        Raises:
            SaveError: If ``state`` is not a flat mapping of text to tensors of a known dtype.
        """
        tensors = _tensors(state)
        write_safetensors(stream, [_info(key, tensor) for key, tensor in tensors.items()], tensors.__getitem__)

    def read(self, stream: BinaryIO, *, weights_only: bool, map_location: Any) -> Any:
        """See `Format.read`; nothing in a safetensors file can run code."""

        def load() -> dict[str, torch.Tensor]:
            contents = SafetensorsContents(stream)
            return {name: contents.read(name) for name in contents.tensors}

        return self._load(load, map_location)

    def read_mapped(self, path: str, *, weights_only: bool, map_location: Any) -> Any:
        """See `SupportsMapping.read_mapped`."""

        def load() -> dict[str, torch.Tensor]:
            with open(path, "rb") as stream:
                contents = SafetensorsContents(stream)  # If a header says two things, safetensors takes one of them.
                for problem in contents.problems():
                    raise CorruptError(problem)
            return _load_file(path)

        return self._load(load, map_location)

    def _load(self, load: Callable[[], dict[str, torch.Tensor]], map_location: Any) -> Any:
        try:
            tensors = load()
        except (OSError, MemoryError):
            raise
        except Exception as error:  # SafetensorError, KeyError for a dtype that a version does not know, CorruptError.
            msg = f"the payload cannot be read as safetensors: {type(error).__name__}: {error}"
            raise CorruptError(msg) from error
        if map_location in (None, "cpu"):
            return tensors
        return {key: tensor.to(map_location) for key, tensor in tensors.items()}

    def refused(self, state: Any) -> Mapping[str, str]:
        """See `Format.refused`: what cannot be written is an error of `write` already."""
        return {}


def _tensors(state: Any) -> dict[str, torch.Tensor]:
    if not isinstance(state, Mapping):
        msg = f"the state is a {type(state).__name__}; safetensors holds a flat mapping of names to tensors: {_ADVICE}"
        raise SaveError(msg)
    # A DTensor that is whole in this process is its own memory.
    tensors = {key: value.to_local() if is_whole_dtensor(value) else value for key, value in state.items()}
    for key, value in tensors.items():
        _check(key, value)
    return tensors


def _check(key: Any, value: Any) -> None:
    is_text = isinstance(key, str)
    if not is_text or not isinstance(value, torch.Tensor):
        what = (
            f"state[{key!r}] is a {type(value).__name__}" if is_text else f"the key {key!r} is a {type(key).__name__}"
        )
        msg = f"{what}; safetensors holds only tensors under text names: {_ADVICE}"
        raise SaveError(msg)
    if key == "__metadata__":
        msg = f"the key {key!r} is reserved in safetensors; rename it, or use format='torch'"
        raise SaveError(msg)
    check_whole(value, f"state[{key!r}]")
    is_plain = not value.is_nested and value.layout == torch.strided
    if not is_plain or not _is_held(value.dtype) or entry(_info(key, value), 0) is None:
        layout = "nested" if value.is_nested else value.layout
        msg = f"state[{key!r}] is {value.dtype}, {layout}; safetensors cannot hold it: use format='torch'"
        raise SaveError(msg)
    if value.is_meta:
        msg = f"state[{key!r}] is on the meta device and has no values; materialise the model before saving it"
        raise SaveError(msg)
    check_stored(value, f"state[{key!r}]")
    if value.numel() and not value.data_ptr():
        msg = f"state[{key!r}] is a {class_name(value)}, which has no memory of its own: use format='torch'"
        raise SaveError(msg)


def _info(key: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name=key, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


@functools.cache
def _is_held(dtype: torch.dtype) -> bool:
    """Return whether the installed safetensors reads a dtype: newer versions hold more of them."""
    if dtype in _ALWAYS:
        return True
    tensor = torch.empty(0, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/probe.safetensors"
        with open(path, "wb") as stream:
            write_safetensors(stream, [_info("w", tensor)], lambda _: tensor)
        try:
            return _load_file(path)["w"].dtype == dtype
        except Exception:  # SafetensorError or KeyError.
            return False
