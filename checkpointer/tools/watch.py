"""Reads how far a training is that another process runs: from its records, its claim and its heartbeat. Reads only."""

from __future__ import annotations

import calendar
import math
import time
from collections.abc import Iterator
from typing import Final, Literal

import attrs

from checkpointer._display import age_text, count_text, size_text, some_of
from checkpointer.commit.created import read_created
from checkpointer.commit.lease import BEATS
from checkpointer.commit.signing import HMACKey
from checkpointer.commit.terms import TERMS, Claim, TermFiles, key_of, read_claim, read_status
from checkpointer.commit.writer_marks import describe, writers_in
from checkpointer.errors import NotFoundError
from checkpointer.policy.triggers import horizon_of
from checkpointer.ports import Storage, SupportsFreeSpace
from checkpointer.records.record import Record
from checkpointer.records.status import TrainingStatus
from checkpointer.storage.owner import is_dead, is_live
from checkpointer.tools.catalog import Catalog, look_at
from checkpointer.tools.policies import Policies

_FAR_S: Final = 365 * 86400.0
"""A disk that is full later than that is not worth a text."""
State = Literal["alive", "silent", "closed", "killed"]
"""``"silent"``: its process is on another machine, and sends no heartbeat. ``"killed"``: it ended without closing."""


@attrs.frozen(kw_only=True)
class Watched:
    """One run, as it is seen from outside. Times are in seconds, sizes in bytes."""

    place: str
    run: str
    label: str = ""
    state: State
    process: str
    """Which process trains it, or did."""
    status: TrainingStatus | None = None
    """What its last heartbeat says."""
    newest: Record | None = None
    """The checkpoint that a restore would take."""
    checkpoints: int = 0
    bytes: int = 0
    """Bytes of the run's checkpoints."""
    due: str = ""
    """Before what no save is due."""
    due_in_s: float | None = None
    """Seconds until then, at the speed since the last checkpoint."""
    free: int | None = None
    full_in_s: float | None = None
    """Seconds until the storage is full, if the run goes on to grow as it has since it began."""
    others: tuple[str, ...] = ()
    """Ids of the other runs, if none is being trained and none was named."""
    problems: tuple[str, ...] = ()
    """Records that are damaged, half-way or without a payload."""

    @property
    def is_alive(self) -> bool:
        """Whether the training runs, as far as that can be seen."""
        return self.state == "alive"


def watch(storage: Storage, now: float, trust: HMACKey | None = None, *, run: str | None = None) -> tuple[Watched, ...]:
    """Return the runs that are being trained; if there is none, the newest run.

    Args:
        storage: The directory. Nothing is written.
        now: Seconds since the Unix epoch.
        trust: The key of a signed directory.
        run: Only this run; ``RUN/LABEL`` is one label of it.

    Raises:
        NotFoundError: If there is no run, or none of that id.

    Example:
        >>> from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
        >>> from checkpointer.testing import MemoryStorage
        >>> storage = MemoryStorage()
        >>> with CheckpointManager(storage, Policy(EverySteps(10), [KeepLast(1)]), state=dict) as manager:
        ...     decision = manager.observe({}, step=10, epoch=0)
        ...     (seen,) = watch(storage, now=0.0)
        >>> seen.state, seen.newest.step, seen.due
        ('alive', 10, 'step 20')
    """
    catalog = look_at(storage, trust)
    claims = {key: found for key in catalog.terms if (found := _claim(catalog, key)) is not None}
    held = [found for found in claims.values() if _state(found, now) in ("alive", "silent")]
    wanted = [
        found
        for found in (claims.values() if run is not None else held)
        if run in (None, found.claim.run, f"{found.claim.run}/{found.claim.label}")
    ]
    others: tuple[str, ...] = ()
    if not wanted and catalog.records:
        # An adopted run has no term.
        own = catalog.named(run)[-1]
        others = tuple(catalog.id_of(*one) for one in catalog.runs if one != own and run is None)
        wanted = [claims.get(key_of(*own)) or _Held(Claim(run=own[0], label=own[1]))]
    if not wanted and run is None:
        wanted = [_Held(Claim(owner=owner)) for owner in writers_in(storage, catalog.files)]
    if not wanted:
        there = ", ".join(dict.fromkeys(name for name, _ in catalog.runs)) or "none"
        below = (
            f" of its own; these directories below have checkpoints: {some_of(catalog.below)}" if catalog.below else ""
        )
        what = f"no run {run!r}; there are: {there}" if run is not None else f"no run{below}"
        msg = f"{catalog.place} has {what}"
        raise NotFoundError(msg)
    policies = Policies(catalog)
    return tuple(attrs.evolve(_watched(catalog, found, policies, now), others=others) for found in wanted)


@attrs.frozen
class _Held:
    """The newest term of a run."""

    claim: Claim
    is_released: bool = False
    status: TrainingStatus | None = None


def _claim(catalog: Catalog, key: str) -> _Held | None:
    """Return the newest term of a training. Commands claim terms too, and note no policy."""
    found, folder = TermFiles.of(catalog.terms.get(key, ()), key), f"{TERMS}/{key}"
    newest = None
    for number in found.claimed[:8]:
        claim = read_claim(catalog.storage, folder, number, catalog.trust)
        if claim.policy or number not in found.ended:
            status = TrainingStatus.from_json(read_status(catalog.storage, folder, number))
            return _Held(claim, number in found.ended, status)
        newest = newest or _Held(claim, is_released=True)
    return newest


def _state(held: _Held, now: float) -> State:
    claim, status = held.claim, held.status
    if held.is_released or not claim.owner:
        return "closed"
    if is_live(claim.owner):
        return "alive"
    if is_dead(claim.owner) or claim.has_ended:
        return "killed"
    # On another machine. Its clock may differ from this one by a part of the lease.
    seen_s = status.time if status is not None else _since_s(claim)
    return "alive" if abs(now - seen_s) <= BEATS * max(claim.beat_s, 1.0) else "silent"


def _since_s(claim: Claim) -> float:
    """Return when a term was claimed, which is before its first heartbeat."""
    try:
        return float(calendar.timegm(time.strptime(claim.since, "%Y-%m-%d %H:%M:%S UTC")))
    except ValueError:
        return 0.0


def _watched(catalog: Catalog, held: _Held, policies: Policies, now: float) -> Watched:
    claim, status = held.claim, held.status
    own = [r for r in catalog.records if (r.run, r.label) == (claim.run, claim.label)]
    newest = catalog.manifest(claim.run, claim.label).newest if own else None
    state = _state(held, now)
    is_alive = state == "alive"
    due, due_in_s = _due(newest, status, policies, claim, now) if is_alive else ("", None)
    size = sum(record.size for record in own)
    free = catalog.storage.free_space() if isinstance(catalog.storage, SupportsFreeSpace) else None
    process = str(claim) if claim.since != Claim().since else describe(claim.owner) if claim.owner else "not known"
    return Watched(
        place=catalog.place,
        run=claim.run,
        label=claim.label,
        state=state,
        process=process,
        status=status,
        newest=newest,
        checkpoints=len(own),
        bytes=size,
        due=due,
        due_in_s=due_in_s,
        free=free,
        full_in_s=_full_in_s(catalog, size, free, now) if is_alive else None,
        problems=tuple(_problems(catalog)),
    )


def _due(
    newest: Record | None, status: TrainingStatus | None, policies: Policies, claim: Claim, now: float
) -> tuple[str, float | None]:
    """Return before what nothing is due, and the seconds until then if that can be estimated."""
    policy = policies.of(claim.run, claim.label)
    if status is None or (newest is not None and newest.time > status.time):
        if newest is None or policy is None:
            return "", None
        ahead = horizon_of(policy.when, newest.progress)
        return ahead.text().removeprefix(" before "), ahead.time - now if math.isfinite(ahead.time) else None
    waits = [status.due_time - now] if math.isfinite(status.due_time) else []
    if newest is not None and status.step > newest.step and status.time > newest.time:
        step_s = (status.time - newest.time) / (status.step - newest.step)
        waits += [(status.due_step - status.step) * step_s - (now - status.time)]
    found = min(waits, default=math.inf)
    return status.due, max(found, 0.0) if math.isfinite(found) else None


def _full_in_s(catalog: Catalog, size: int, free: int | None, now: float) -> float | None:
    """Return when the storage is full, at the average growth since the directory was begun."""
    created = read_created(catalog.storage)
    if free is None or created is None or not size or now <= created:
        return None
    return free * (now - created) / size


def _problems(catalog: Catalog) -> Iterator[str]:
    yield from map(str, catalog.damaged.values())
    yield from (f"the payload of {record.name} is gone, or of another size" for record in catalog.missing)
    yield from (f"{entry.record.name} is half-way" for entry in catalog.unfinished if is_dead(entry.owner))


def lines_of(seen: Watched, now: float) -> list[tuple[str, str]]:
    """Return what there is to say of a run, a line each."""
    status, newest = seen.status, seen.newest
    said = f", {age_text(now - status.time)} ago" if status is not None else ""
    is_adopted = newest is not None and newest.is_adopted and not seen.is_alive
    how = "adopted; nothing is known of the program that wrote it" if is_adopted else _STATES[seen.state]
    others = f"{some_of(seen.others)}; --run ID shows one"
    lines = [
        ("run", f"{seen.run or 'not saved yet'}{f' ({seen.label})' if seen.label else ''}: {how}"),
        ("others", others if seen.others else ""),
        ("process", "" if is_adopted else seen.process),
        ("step", f"{status.step}{said}" if status is not None and status.step >= 0 else ""),
        ("saved", f"{newest.name}, step {newest.step}, {age_text(now - newest.time)} ago" if newest else "nothing yet"),
        ("writing", _writing(status) if status is not None and seen.is_alive else ""),
        ("next save", _next(seen)),
        ("mirror", _mirror(status) if status is not None else ""),
        ("disk", _disk(seen)),
    ]
    return [(name, text) for name, text in lines if text] + [("problem", text) for text in seen.problems]


_STATES: dict[State, str] = {
    "alive": "alive",
    "silent": "silent; its machine sends no heartbeat",
    "closed": "ended; its manager was closed",
    "killed": "ended without closing: killed",
}


def _writing(status: TrainingStatus) -> str:
    if not status.writing or not status.written:
        return status.writing
    of = f" of about {size_text(status.expected)}" if status.expected >= status.written else ""
    return f"{status.writing}, {size_text(status.written)}{of}"


def _next(seen: Watched) -> str:
    interval = "when the interval ends"
    due = seen.due.replace(" or the next interval ends", f", or {interval}").replace("the next interval ends", interval)
    soon = f"in about {age_text(seen.due_in_s)}" if seen.due_in_s is not None else ""
    at = "" if not due else due if due == interval else f"at {due}"
    return f"{at} ({soon})" if at and soon else at or soon


def _mirror(status: TrainingStatus) -> str:
    if not status.mirror:
        return ""
    lag = f"{count_text(status.behind, 'checkpoint')} behind ({size_text(status.behind_bytes)})"
    error = f"; {status.mirror_error}" if status.mirror_error else ""
    return f"{status.mirror}, {lag if status.behind else 'up to date'}{error}"


def _disk(seen: Watched) -> str:
    own = f"{count_text(seen.checkpoints, 'checkpoint')}, {size_text(seen.bytes)}"
    if seen.free is None:
        return own
    more = int(seen.free // seen.newest.size) if seen.newest is not None and seen.newest.size else None
    room = f", room for {count_text(more, 'more')}".replace("mores", "more") if more is not None else ""
    full = (
        f", full in {age_text(seen.full_in_s)} at the rate so far"
        if seen.full_in_s is not None and seen.full_in_s < _FAR_S
        else ""
    )
    return f"{own}; {size_text(seen.free)} free{room}{full}"
