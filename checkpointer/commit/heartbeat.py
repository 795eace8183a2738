"""The thread that writes the heartbeat of a term, and with it how far the training is.

`BEATS` in `checkpointer.commit.lease` is the number of heartbeats in one lease.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import attrs

from checkpointer.commit.terms import Term
from checkpointer.ports import Storage

_log = logging.getLogger("checkpointer")


@attrs.define
class Status:
    """What a heartbeat says of the training. It refers to no manager, because the thread must not keep one alive."""

    read: Callable[[], str] = attrs.field(default=lambda: "")
    """Returns one line; called on the heartbeat's thread."""


class Heartbeat:
    """Writes the heartbeat of a term, on a thread of its own: one small request a few times per lease.

    Args:
        term: The term.
        open: Returns a storage that the thread may use; called on the thread, before the first heartbeat.
        status: What each heartbeat says of the training.
    """

    def __init__(self, term: Term, open: Callable[[], Storage], status: Status) -> None:
        self._ended = threading.Event()
        work = (self._ended, term, open, status)
        threading.Thread(target=_keep_beating, args=work, name="checkpointer-heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Let the thread end."""
        self._ended.set()


def _keep_beating(ended: threading.Event, term: Term, open: Callable[[], Storage], status: Status) -> None:
    storage: Storage | None = None
    number = 0
    while not ended.wait(term.beat_s):
        number += 1
        try:
            storage = storage or open()
            term.beat(storage, number, _read(status))
        except Exception as error:  # Without a heartbeat another process may take over. Training goes on.
            _log.debug("no heartbeat could be written: %r", error)
            storage = None
        except BaseException:  # The process ends.
            return


def _read(status: Status) -> str:
    try:
        return status.read()
    except Exception as error:  # The heartbeat matters more than what it says.
        _log.debug("the heartbeat has no status: %r", error)
        return ""
