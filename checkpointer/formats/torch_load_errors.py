"""Why a torch file could not be read: damage, or something in it that a safe load refuses."""

from __future__ import annotations

import contextlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final

from checkpointer.errors import CorruptError, UnsafePayloadError
from checkpointer.formats.archive_reader import OtherLayoutError

_MAX_REASON: Final = 1000
"""Characters of the reason that torch gives: it may repeat what is in the file."""


@contextlib.contextmanager
def raising_unreadable(file: Callable[[], BinaryIO], start: int = 0, *, weights_only: bool) -> Iterator[None]:
    """Translate the errors of a load. Errors of the disk or of memory say nothing about the payload and pass unchanged.

    Args:
        file: Returns the torch file that is loaded, or one with the same pickle.
        start: Where it begins in what ``file`` returns (bytes).
        weights_only: Whether the load is a safe one.

    Raises:
        UnsafePayloadError: If a safe load refuses something in the file.
        CorruptError: If it is not a torch file.
    """
    import torch

    try:
        yield
    except (OSError, MemoryError, OtherLayoutError, torch.cuda.OutOfMemoryError):
        raise
    except CorruptError as error:
        msg = f"the payload is not a torch file that can be read: {error}"
        raise CorruptError(msg) from error
    except pickle.UnpicklingError as error:
        refused = _refusal(file(), start, error) if weights_only else ""
        if not refused:
            msg = f"the payload is not a torch file that can be read: {reason_of(error)}"
            raise CorruptError(msg) from error
        msg = (
            f"the payload holds {refused}, which a safe load refuses to unpickle; if you trust "
            "its writer, pass weights_only=False, or allow the class with torch.serialization.add_safe_globals"
        )
        raise UnsafePayloadError(msg) from error
    except Exception as error:  # Damaged bytes fail anywhere in torch: IndexError, AssertionError, struct.error...
        msg = f"the payload cannot be read as a torch file: {type(error).__name__}: {str(error)[:_MAX_REASON]}"
        raise CorruptError(msg) from error


def _refusal(stream: BinaryIO, start: int, error: pickle.UnpicklingError) -> str:
    """Return what a safe load refused; empty if it was damage that stopped it."""
    is_cut = not stream.read(1)  # A file without a zip's directory may end in the middle of a name.
    stream.seek(start)
    names = unsafe_globals(stream)
    if not names and not is_cut:
        names = re.findall(r"GLOBAL (\S+) ", reason_of(error))
    stream.seek(start)
    return ", ".join(names) or (f"an instruction ({reason_of(error)})" if _is_pickle_whole(stream) else "")


def unsafe_globals(stream: BinaryIO) -> list[str]:
    """Return what a safe load of a torch file would refuse, by name."""
    import torch

    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(stream))
    except Exception:  # No zip file: then the error of the load has to name them.
        return []


def _is_pickle_whole(stream: BinaryIO) -> bool:
    """Return whether this is a torch file whose pickle has the checksum it was written with."""
    try:
        with zipfile.ZipFile(stream) as archive:
            pickles = [member for member in archive.infolist() if member.filename.endswith("/data.pkl")]
            # torch writes no checksum where set_crc32_options(False) says so.
            return bool(pickles) and all(not member.CRC or archive.read(member) for member in pickles)
    except Exception:
        return False


def reason_of(error: BaseException) -> str:
    """Return what the unpickler said, without the page of advice that torch puts around it."""
    return str(error.__context__ or error)[:_MAX_REASON]
