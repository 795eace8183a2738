"""Every error and warning of this library, in one tree.

::

    CheckpointerError
    ├── PolicyError        (ValueError)         a policy, trigger, rule or flag with an invalid value
    ├── NamingError        (ValueError)         a template or name that cannot be used
    ├── ObservationError   (ValueError)         the loop reported a value that cannot be used
    │   ├── MetricError    (TypeError)          a metric that is not one number
    │   └── UnknownValueError (KeyError)        a loop does not hold a value of that name
    ├── RecordError        (ValueError)         a record, index or host state that cannot be read
    │   ├── SchemaError                         ... because a newer version of this library wrote it
    │   └── UntrustedError (RestoreError)       ... because it is not signed with the manager's key
    ├── StorageError       (OSError)            the directory cannot be used
    │   ├── ConflictError                       another process uses the same run or alias
    │   │   ├── AliasInUseError                 ... a live manager keeps the same alias
    │   │   ├── RunInUseError                   ... it trains the run that this process would go on with
    │   │   └── FencedError                     ... it has taken over the run, so this process must end
    │   └── NameTakenError (FileExistsError)    a file of others has the name that a save needs
    ├── SaveError          (RuntimeError)       a checkpoint was not written; older ones are untouched
    │   └── NotEnoughSpaceError (OSError)       ... because the storage has too little room
    ├── RestoreError       (RuntimeError)       nothing could be restored
    │   ├── NotFoundError  (FileNotFoundError)  no checkpoint of that name, step or path
    │   ├── CorruptError                        the payload differs from its record, or cannot be read
    │   ├── UnsafePayloadError                  the payload holds objects that a safe load refuses
    │   ├── MismatchError  (ValueError)         the state does not fit the objects that load it
    │   └── NoValidCheckpointError              there are checkpoints, but none is valid
    ├── RanksError         (RuntimeError)       the processes of a training cannot act together
    └── ClosedError        (RuntimeError)       the manager was closed

    CheckpointerWarning    (UserWarning)        training goes on, but the user should act
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Final

_MAX_REASON: Final = 300
"""Characters of the reason that another library gives."""
_BETWEEN: Final = frozenset({
    *("checkpointer", "checkpointer_lightning", "checkpointer_torch", "checkpointer_transformers"),
    *("accelerate", "attr", "contextlib", "ignite", "keras", "lightning", "pytorch_lightning"),
    *("rich", "torch", "tqdm", "transformers"),
})  # fmt: skip
"""Packages whose lines a warning does not show, because the user wrote none of them."""


class CheckpointerError(Exception):
    """The root: ``except CheckpointerError`` catches every error that this library raises."""


class PolicyError(CheckpointerError, ValueError):
    """A policy, trigger, rule or flag has an invalid value."""


class NamingError(CheckpointerError, ValueError):
    """A template cannot be parsed, or a name cannot be used on disk."""


class ObservationError(CheckpointerError, ValueError):
    """The loop reported a step, epoch or metric that cannot be used."""


class MetricError(ObservationError, TypeError):
    """A metric is not a single real number."""


class UnknownValueError(ObservationError, KeyError):
    """A loop does not hold a value of the name that was read or written."""

    __str__ = Exception.__str__  # A KeyError shows its text in quotes.


class RecordError(CheckpointerError, ValueError):
    """A record, an index entry or a host's saved state cannot be read; the message says where."""


class SchemaError(RecordError):
    """The data was written by a newer version of this library."""


class StorageError(CheckpointerError, OSError):
    """The storage refused an operation that the manager needs."""


class ConflictError(StorageError):
    """Another process uses the run or an alias of this manager. It is never tolerated as a failed save."""


class AliasInUseError(ConflictError):
    """Another live manager owns this alias in this directory."""


class RunInUseError(ConflictError):
    """Another process trains this run in this directory, and sends heartbeats."""


class FencedError(ConflictError):
    """Another process has taken over the run. This process must not change the directory any more."""


class NameTakenError(StorageError, FileExistsError):
    """A file of others has the name that a save is about to write."""


class SaveError(CheckpointerError, RuntimeError):
    """A checkpoint could not be written. No older one was retired for it."""


class NotEnoughSpaceError(SaveError, OSError):
    """The storage has less free space than the last checkpoint took; nothing was written."""


class RestoreError(CheckpointerError, RuntimeError):
    """Nothing could be restored."""


class NotFoundError(RestoreError, FileNotFoundError):
    """No checkpoint has that name, step or path."""


class CorruptError(RestoreError):
    """A payload differs from its record, or cannot be read."""


class UnsafePayloadError(RestoreError):
    """A payload holds objects that a safe load refuses to unpickle."""


class UntrustedError(RecordError, RestoreError):
    """A record's signature is missing or wrong, or its directory is signed and the manager has no key."""


class MismatchError(RestoreError, ValueError):
    """A state does not fit the objects that load it; the message lists the differences by name."""


class NoValidCheckpointError(RestoreError):
    """There are checkpoints, but none is valid. A training must not start over silently."""


class RanksError(CheckpointerError, RuntimeError):
    """The processes of a training cannot act together, or another process failed; the message names it."""


class ClosedError(CheckpointerError, RuntimeError):
    """The manager was used after ``close()``."""


class CheckpointerWarning(UserWarning):
    """Training goes on, but the user should act."""


__all__ = [name for name in dir() if name.endswith(("Error", "Warning"))]


def portable(error: Exception) -> Exception:
    """Return an error that can be sent to other ranks: the error itself, or a `RanksError` with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RanksError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Turn every error of reading foreign bytes into a `CorruptError` that begins with the place.

    Other errors of this library, and those of the disk and of memory, pass unchanged.

    Example:
        >>> with reading("a.ckpt"):
        ...     raise KeyError("w")
        Traceback (most recent call last):
        checkpointer.errors.CorruptError: a.ckpt: it cannot be read (KeyError: 'w')
    """
    try:
        yield
    except CorruptError as error:
        if str(error).startswith(place):
            raise
        msg = f"{place}: {error}"
        raise type(error)(msg) from error
    except (CheckpointerError, OSError, MemoryError):
        raise
    except Exception as error:
        msg = f"{place}: it cannot be read ({type(error).__name__}: {str(error)[:_MAX_REASON]})"
        raise CorruptError(msg) from error


@contextlib.contextmanager
def failures_as_warnings(what: str = "") -> Iterator[None]:
    """Turn an error into a warning, so that it does not hide the error that ended the training."""
    try:
        yield
    except Exception as failure:
        warn(f"{what}: {failure!r}" if what else str(failure))


def warn(message: str, category: type[Warning] = CheckpointerWarning) -> None:
    """Warn. The warning shows the line of the user's program that called this library, or called the framework.

    On a thread of this library there is no such line. Then the warning shows the line of this library.
    """
    first = sys._getframe(1)
    frame: FrameType | None = first
    while frame is not None and _package_of(frame) in _BETWEEN:
        frame = frame.f_back
    if frame is None or _package_of(frame) == "threading":
        frame = first
    place = frame.f_globals
    registry = place.setdefault("__warningregistry__", {})
    name = place.get("__name__", "<unknown>")
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, name, registry)


def _package_of(frame: FrameType) -> str:
    """Return the name of the package that a line belongs to; attrs' generated functions have none and belong to it."""
    if frame.f_code.co_filename.startswith("<attrs generated"):
        return "attr"
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
