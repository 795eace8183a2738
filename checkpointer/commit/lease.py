"""Holds a run for one process: how long the lease lasts, how many heartbeats it has, and when a holder is replaced."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import attrs

from checkpointer.commit.signing import HMACKey, signed
from checkpointer.commit.terms import TERMS, Claim, Term, TermFiles, key_of, read_beat, read_claim
from checkpointer.errors import PolicyError, RunInUseError, StorageError
from checkpointer.ports import Storage, SupportsDiscard
from checkpointer.records.record import SCHEMA
from checkpointer.storage.owner import is_dead, is_live, machine

LEASE_S: Final = 60.0
"""A holder that sends no heartbeat for so many seconds may be replaced."""
TAKEOVER: Final = "CHECKPOINTER_TAKEOVER"
BEATS: Final = 4
"""Heartbeats in one lease."""
MAX_BEAT_S: Final = 3600.0
_REFUSALS: Final = 16
"""If a claim cannot be created so often, it is not that of another process, which a listing would show by then."""
_POLLS: Final = 20
"""Polls of the heartbeat in one lease."""

_log = logging.getLogger("checkpointer")


@attrs.frozen
class Lease:
    """How a process comes to hold a run that another one may still train."""

    seconds: float = LEASE_S
    """A holder that sends no heartbeat for so long is replaced."""
    takeover: bool = False
    """Replace a holder even if it is alive."""
    waits: bool = True
    """If False, a holder that may be alive is not replaced at all."""
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic


def as_lease(seconds: float, takeover: bool | None) -> Lease:
    """Check the arguments of a manager. If ``takeover`` is None, the environment variable decides."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        msg = f"lease_s is {seconds!r}; expected a number of seconds above 0"
        raise PolicyError(msg)
    asked = os.environ.get(TAKEOVER, "")
    if takeover is None and asked not in ("", "0", "1"):
        msg = f"the environment variable {TAKEOVER} is {asked!r}; expected 1, 0, or nothing"
        raise PolicyError(msg)
    return Lease(seconds=float(seconds), takeover=asked == "1" if takeover is None else bool(takeover))


def claim_term(
    storage: Storage,
    run: str,
    label: str,
    owner: str,
    lease: Lease,
    trust: HMACKey | None = None,
    *,
    is_new: bool,
    policy: str = "",
) -> Term:
    """Claim the next term of a run (step 4). ``is_new`` is a run that no other process can know, so nothing is listed.

    What a holder that is replaced has staged is removed, on a disk or S3. The claim contains the ``policy`` (YAML), so
    that commands need not be given it.

    Raises:
        RunInUseError: If another process holds the run, and sends a heartbeat within the lease.
    """
    key = key_of(run, label)
    folder = f"{TERMS}/{key}"
    refused: Counter[int] = Counter()
    while True:
        found = TermFiles() if is_new else TermFiles.of(storage.list(folder), key)
        holder = Claim()
        if found.highest and found.highest not in found.ended:
            holder = read_claim(storage, folder, found.highest, trust)
            if not holder.has_ended and not _may_replace(storage, folder, found.highest, holder, lease, run):
                continue
        term = Term(storage, run, label, found.highest + 1, owner, lease.seconds / BEATS, trust, holder.owner)
        if _create(term, policy):
            if term.before and not is_dead(term.before) and isinstance(storage, SupportsDiscard):
                with contextlib.suppress(OSError):  # The term is claimed. What stays is swept a day later.
                    storage.discard(term.before)
            return term
        is_new = False
        refused[term.number] += 1
        if refused[term.number] == _REFUSALS:
            msg = (
                f"{folder}/{term.number}.json in {storage} cannot be created, and no listing shows it. A process on "
                "another host may have been stopped while it created this file; then start again when 15 minutes have "
                "passed since. Or an empty folder has this name; then remove it"
            )
            raise StorageError(msg)


def _create(term: Term, policy: str) -> bool:
    """Create the claim; return False if another process has created it."""
    claim = {
        "schema": SCHEMA,
        "run": term.run,
        "label": term.label,
        "term": term.number,
        "owner": term.owner,
        "machine": machine(),
        "beat_s": term.beat_s,
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        **({"policy": policy} if policy else {}),
    }
    upload = term.storage.upload(f"{term.folder}/{term.number}.json")
    try:
        upload.write(json.dumps(signed(claim, term.trust)).encode())
        upload.finish()
        upload.publish(replace=False)
    except FileExistsError:
        # The reply to our own request may have been lost.
        return read_claim(term.storage, term.folder, term.number, term.trust).owner == term.owner
    finally:
        upload.abort()
    return True


def _may_replace(storage: Storage, folder: str, number: int, holder: Claim, lease: Lease, run: str) -> bool:
    """Return whether the holder of a term may be replaced; False if the terms have changed meanwhile."""
    if lease.takeover:
        return True
    if is_live(holder.owner) and holder.owner.split("~")[1] == str(os.getpid()):
        raise _in_use(storage, run, number, holder, "it is another manager of this process; close() that one")
    if not lease.waits:
        raise _in_use(storage, run, number, holder, "it may be alive")
    # The holder may have a longer lease, and sends heartbeats less often then.
    patience_s = max(lease.seconds, BEATS / 2 * min(holder.beat_s, MAX_BEAT_S))
    text = (
        "%s: %s holds run %r (term %d); waiting up to %g s for its heartbeat before this process goes on with the run"
    )
    _log.warning(text, storage, holder, run, number, patience_s)
    began = lease.now()
    first = read_beat(storage, folder, number)
    while (waited := lease.now() - began) < patience_s:
        lease.sleep(min(patience_s / _POLLS, max(0.0, patience_s - waited)))
        found = TermFiles.of(storage.list(folder), folder.rpartition("/")[2])
        if found.highest > number or number in found.ended or is_dead(holder.owner):
            return False
        if read_beat(storage, folder, number) != first:
            text = f"its last heartbeat came {lease.now() - began:.0f} s after this process had begun to wait"
            raise _in_use(storage, run, number, holder, text)
    text = "%s: %s sent no heartbeat for %g s; this process takes over run %r"
    _log.warning(text, storage, holder, patience_s, run)
    return True


def _in_use(storage: Storage, run: str, number: int, holder: Claim, why: str) -> RunInUseError:
    return RunInUseError(
        f"{holder} trains run {run!r} in {storage} (term {number}): {why}. Two processes must not train one run. "
        "Stop one of them; or, if the other one is to be replaced, pass takeover=True or set CHECKPOINTER_TAKEOVER=1 "
        "(then the other one ends at its next save)"
    )
