"""Payload formats by name. Importing this imports neither torch nor safetensors; opening one does."""

from __future__ import annotations

from checkpointer.errors import PolicyError
from checkpointer.ports import Format

__all__ = ["open_format"]


def open_format(format: str | Format) -> Format:
    """Return the format of that name, or the user's own.

    Args:
        format: ``"torch"``, ``"safetensors"``, or a `checkpointer.ports.Format`.

    Raises:
        PolicyError: If the name is not known.
        ImportError: If the format's package is not installed; the message names the extra.
    """
    if not isinstance(format, str):
        return format
    if format == "torch":
        from checkpointer.formats.torch_file import TorchFormat

        return TorchFormat()
    if format == "safetensors":
        from checkpointer.formats.safetensors_file import SafetensorsFormat

        return SafetensorsFormat()
    msg = f"the payload format {format!r} is not known (known: torch, safetensors); pass a Format of your own"
    raise PolicyError(msg)
