"""Payload formats by name. Importing this imports neither torch nor safetensors; opening one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, overload

from checkpointer.errors import PolicyError
from checkpointer.ports import FolderFormat, Format

if TYPE_CHECKING:
    from checkpointer.formats.one_pass_memory import Layout

__all__ = ["format_of", "layout_of", "open_format"]


@overload
def open_format(
    format: Literal["torch", "safetensors"] | Format, storage_options: Mapping[str, Any] | None = None
) -> Format: ...
@overload
def open_format(
    format: Literal["dcp"] | FolderFormat, storage_options: Mapping[str, Any] | None = None
) -> FolderFormat: ...
@overload
def open_format(
    format: str | Format | FolderFormat, storage_options: Mapping[str, Any] | None = None
) -> Format | FolderFormat: ...
def open_format(
    format: str | Format | FolderFormat, storage_options: Mapping[str, Any] | None = None
) -> Format | FolderFormat:
    """Return the format of that name, or the user's own.

    Args:
        format: ``"torch"``, ``"safetensors"``, ``"dcp"``, or a `checkpointer.ports.Format` or ``FolderFormat``.
        storage_options: What the format needs besides the URL where it reads and writes a folder by itself.

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
    if format == "dcp":
        from checkpointer.formats.dcp_folder import DcpFormat

        return DcpFormat(storage_options=storage_options)
    msg = f"the payload format {format!r} is not known (known: torch, safetensors, dcp); pass a Format of your own"
    raise PolicyError(msg)


def format_of(stream: BinaryIO, expected: Format) -> Format:
    """Return the format to read a file with: what its bytes say, where they say something else than was expected.

    Only ``"torch"`` and ``"safetensors"`` are exchanged: what the bytes of another format look like is its own affair.
    """
    if expected.name not in ("torch", "safetensors"):
        return expected
    from checkpointer.formats.inspection.payload import sniff

    found = sniff(stream)
    return expected if found in (None, expected.name) else open_format(found)


def layout_of(stream: BinaryIO, payload: Format, *, is_mapped: bool) -> Layout | None:
    """Return where each byte of a file goes that is read once; None if ``payload`` has to read it by itself."""
    # By their modules, because a format of the user's own may have the same name, or be a subclass.
    if type(payload).__module__ == f"{__name__}.torch_file":
        from checkpointer.formats.torch_one_pass import TorchLayout

        return TorchLayout.of(stream, is_mapped=is_mapped)
    if type(payload).__module__ == f"{__name__}.safetensors_file":
        from checkpointer.formats.safetensors_one_pass import SafetensorsLayout

        return SafetensorsLayout.of(stream, is_mapped=is_mapped)
    return None
