"""Every error and warning of this library, in one tree.

::

    CheckpointerError
    ├── PolicyError        (ValueError)         a policy, trigger, rule or flag that cannot mean anything
    ├── NamingError        (ValueError)         a template or name that cannot be used
    ├── ObservationError   (ValueError)         something the loop reported that cannot be used
    │   ├── MetricError    (TypeError)          a metric that is not one number
    │   └── UnknownValueError (KeyError)        a loop was asked for a value that it does not hold
    ├── RecordError        (ValueError)         a record, index or host state that cannot be read
    │   ├── SchemaError                         ... because a newer version of this library wrote it
    │   └── UntrustedError (RestoreError)       ... because it is not signed with the manager's key
    ├── StorageError       (OSError)            the directory cannot be used as asked
    │   ├── AliasInUseError                     two live managers want the same alias
    │   └── NameTakenError (FileExistsError)    a file appeared under the name that was about to be written
    ├── SaveError          (RuntimeError)       a checkpoint was not written; everything older is untouched
    │   └── NotEnoughSpaceError (OSError)       ... because the disk would not hold it
    ├── RestoreError       (RuntimeError)       nothing could be restored as asked
    │   ├── NotFoundError  (FileNotFoundError)  no checkpoint of that name, step or path
    │   ├── CorruptError                        payload and record disagree, or the payload cannot be read
    │   ├── UnsafePayloadError                  the payload holds what a safe load refuses to unpickle
    │   ├── MismatchError  (ValueError)         the state is of other objects than those that are to take it
    │   └── NoValidCheckpointError              there are payloads, but none is valid
    ├── RanksError         (RuntimeError)       the processes of a training cannot act together
    └── ClosedError        (RuntimeError)       the manager was closed

    CheckpointerWarning    (UserWarning)        something to act on; training goes on
"""

from __future__ import annotations

import pickle

__all__ = [
    "AliasInUseError",
    "CheckpointerError",
    "CheckpointerWarning",
    "ClosedError",
    "CorruptError",
    "MetricError",
    "MismatchError",
    "NameTakenError",
    "NamingError",
    "NoValidCheckpointError",
    "NotEnoughSpaceError",
    "NotFoundError",
    "ObservationError",
    "PolicyError",
    "RanksError",
    "RecordError",
    "RestoreError",
    "SaveError",
    "SchemaError",
    "StorageError",
    "UnknownValueError",
    "UnsafePayloadError",
    "UntrustedError",
]


class CheckpointerError(Exception):
    """The root: ``except CheckpointerError`` catches whatever this library raises."""


class PolicyError(CheckpointerError, ValueError):
    """A policy, trigger, rule or flag has a value that cannot mean anything."""


class NamingError(CheckpointerError, ValueError):
    """A template cannot be parsed, or a name cannot be used on disk."""


class ObservationError(CheckpointerError, ValueError):
    """The loop reported a step, epoch or metric that cannot be used."""


class MetricError(ObservationError, TypeError):
    """A metric is not a single real number."""


class UnknownValueError(ObservationError, KeyError):
    """A loop does not hold the value that was read or written by its name."""

    __str__ = Exception.__str__  # A KeyError shows its text in quotes.


class RecordError(CheckpointerError, ValueError):
    """A record, an index entry or a host's saved state cannot be read; the message says where."""


class SchemaError(RecordError):
    """The data was written by a newer version of this library."""


class StorageError(CheckpointerError, OSError):
    """The storage refused something the manager cannot do without."""


class AliasInUseError(StorageError):
    """Another live manager owns this alias in this directory."""


class NameTakenError(StorageError, FileExistsError):
    """A file that is not ours appeared under the name that was about to be written."""


class SaveError(CheckpointerError, RuntimeError):
    """A checkpoint could not be written. Nothing older was retired for it."""


class NotEnoughSpaceError(SaveError, OSError):
    """The storage has less room than the last checkpoint took; nothing was written."""


class RestoreError(CheckpointerError, RuntimeError):
    """Nothing could be restored as asked."""


class NotFoundError(RestoreError, FileNotFoundError):
    """No checkpoint has that name, step or path."""


class CorruptError(RestoreError):
    """A payload differs from what its record says, or cannot be read at all."""


class UnsafePayloadError(RestoreError):
    """A payload holds objects that a safe load refuses to unpickle."""


class UntrustedError(RecordError, RestoreError):
    """A record's signature is missing or wrong, or its directory is signed and the manager has no key."""


class MismatchError(RestoreError, ValueError):
    """A state does not fit the objects that are to take it; the message lists how they differ, by name."""


class NoValidCheckpointError(RestoreError):
    """There are payloads, but none is valid. Starting over silently would hide that."""


class RanksError(CheckpointerError, RuntimeError):
    """The processes of a training cannot act together, or another of them failed: the message says which."""


class ClosedError(CheckpointerError, RuntimeError):
    """The manager was used after ``close()``."""


class CheckpointerWarning(UserWarning):
    """Something the user should act on, while training goes on."""


def portable(error: Exception) -> Exception:
    """Return an error that can be sent to other ranks: itself, or what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RanksError(f"{type(error).__name__}: {error}")
    return error
