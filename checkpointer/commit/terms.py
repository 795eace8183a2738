"""Keeps one writer for a run: each process that writes to it holds a *term*, and the highest term counts.

The argument. A term is a number that only grows, for one run and label in one directory. These are its files, in
``.checkpointer/terms/<key>``:

- ``<term>.json``: the *claim*. It is created once, by a request that fails if it exists, and never replaced or removed.
- ``<term>.limits``: for this and earlier terms, up to which serial the records of lower terms count, and which
  checkpoints writers of lower terms may still change.
- ``<term>.beat``: a number that the holder changes every few seconds; after it, on a line of its own, how far the
  training is, for ``checkpointer watch``.
- ``<term>.end``: the holder has released the term.

The holder of a term (the old writer) and the process that claims the next one (the new writer) act in this order:

1. *Announce*: before the old writer replaces or removes an existing file, it writes which ones to its file of changes.
   No other writer writes that file: see `checkpointer.commit.changes`.
2. *Check*: after that the old writer looks for the claim of the next term. If it exists, the old writer is *fenced*: it
   changes nothing, and raises `FencedError`.
3. *Change*: the old writer makes the changes that it has announced, and no others.
4. *Claim*: the new writer creates the claim of the next term. If another process has created it, that one has the term.
5. *Read*: after that the new writer lists the directory, and reads the changes of every writer that may be alive.
6. *Limit*: the new writer writes ``<term>.limits``: the highest serial that it counts, the limits that it applied, and
   the checkpoints that were announced in step 5. Readers use the file of the highest term only, so a file that is
   written late changes nothing.

Either step 2 comes after step 4, and the old writer changes nothing. Or it comes before, so step 1 comes before step
5, and the new writer reads what the old writer may still change, now or later. It relies on none of it. A checkpoint
that is being removed does not count. If the payload or record of a checkpoint may still change, because it is being
replaced, rewritten or not yet committed, the checkpoint gets another name. The copy is verified before a record is
committed for it, because the old writer may replace the payload just before it is copied. The names are never used
again, as long as the old writer may be alive. This holds if each process is paused between any two of its operations,
for any time.

An old writer writes *new* files without these steps, because a new file harms nothing: its record is created once, so
no name is used twice. If such a record is committed after step 5, its serial is above the limit, or it was pending in
step 5 and a record of a higher term has its token. It is listed, but is never ``last``, never ranked, and no run goes
on from it by itself.

The index is written without these steps, too. It is a cache: an entry counts only if the listing shows the version of
the record that the entry was read from. An old writer's index is never believed over a record.

A storage must show a file to every reader once its write has returned, if it is asked for that file and in a listing.
The claim and the changes of the writer before are asked for by name; the records are found by a listing, which is
repeated until the same changes are announced before it and after it. If a listing lags behind a write, step 5 may miss
the newest checkpoint. A network mount that caches missing files (NFS) breaks this for as long as it caches: then step 2
sees the claim that much later.

The clocks of two hosts are never compared. Whether a holder is alive decides when a term is claimed, not what is safe.
`checkpointer.commit.lease` claims terms, and waits for the heartbeats of a holder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
from collections.abc import Iterable
from typing import Any, Final

import attrs
import xxhash

from checkpointer.commit.changes import MAX_CHANGES_BYTES, put
from checkpointer.commit.signing import HMACKey, check_signature, signed
from checkpointer.errors import FencedError, RecordError
from checkpointer.ports import Storage
from checkpointer.records.codec import MAX_RECORD_BYTES, as_number, parse_json
from checkpointer.records.manifest import Limits
from checkpointer.records.record import SCHEMA, Record
from checkpointer.storage.owner import has_ended, host_of, is_here, is_of_host
from checkpointer.storage.reader import read_small

TERMS: Final = ".checkpointer/terms"
MAX_STATUS_BYTES: Final = 1 << 14
_FILE: Final = re.compile(r"([1-9]\d{0,8})\.(json|beat|end|limits)")

_log = logging.getLogger("checkpointer")


def key_of(run: str, label: str) -> str:
    """Return the name of the folder with the terms of a run and label."""
    return xxhash.xxh3_64_hexdigest(f"{run}\n{label}".encode())


@attrs.frozen(kw_only=True)
class TermFiles:
    """The terms of one run, by the names of their files."""

    claimed: tuple[int, ...] = ()
    """Every term that was claimed, the highest first."""
    ended: frozenset[int] = frozenset()
    """Terms that were released."""
    limiting: tuple[int, ...] = ()
    """Every term that has limits, the highest first."""

    @classmethod
    def of(cls, paths: Iterable[str], key: str) -> TermFiles:
        """Read the names of the files in ``.checkpointer/terms/<key>``; leave out other paths."""
        folder = f"{TERMS}/{key}/"
        # If a folder has the name of a claim, no process can create that claim: it counts as that of an unknown holder.
        names = {path[len(folder) :].partition("/")[0] for path in paths if path.startswith(folder)}
        found = [(int(match[1]), match[2]) for match in map(_FILE.fullmatch, names) if match]
        return cls(
            claimed=tuple(sorted((term for term, kind in found if kind == "json"), reverse=True)),
            ended=frozenset(term for term, kind in found if kind == "end"),
            limiting=tuple(sorted((term for term, kind in found if kind == "limits"), reverse=True)),
        )

    @property
    def highest(self) -> int:
        """The term that counts; 0 if there is none."""
        if not self.claimed:
            return max(self.limiting, default=0)  # In a copy of a directory.
        numbers = self.claimed[::-1]
        # A file that is beyond a gap was not made by this library.
        return next((n for n, after in itertools.zip_longest(numbers, numbers[1:]) if after != n + 1), 0)


def by_key(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of terms among these, by the name of their folder."""
    found: dict[str, list[str]] = {}
    for path in paths:
        if path.startswith(f"{TERMS}/"):
            found.setdefault(path[len(TERMS) + 1 :].partition("/")[0], []).append(path)
    return found


Announced = dict[tuple[str, str], tuple[int, frozenset[str]]]
"""By run and label: the highest term that has limits, and the checkpoints that lower terms may still change."""


def read_limits(
    storage: Storage, files: Iterable[str], records: Iterable[Record], trust: HMACKey | None
) -> tuple[Limits, Announced, dict[str, RecordError]]:
    """Return which records count after a takeover, what was announced by then, and each file that cannot be read.

    If a file cannot be read, that of the term before counts, and the first record of the term itself: it was committed
    after the takeover, so a newer record of a lower term was, too.
    """
    paths = by_key(files)
    first: dict[tuple[str, str], dict[int, int]] = {}
    for record in records if paths else ():
        serials = first.setdefault((record.run, record.label), {})
        serials[record.term] = min(record.serial, serials.get(record.term, record.serial))
    limits: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {}
    announced: Announced = {}
    damaged: dict[str, RecordError] = {}
    for run, serials in first.items():
        pairs: list[tuple[int, int]] = []
        for number in TermFiles.of(paths.get(key_of(*run), ()), key_of(*run)).limiting:
            path = f"{TERMS}/{key_of(*run)}/{number}.limits"
            try:
                data = _read_json(storage, path, trust, MAX_CHANGES_BYTES)
                found, names = _limits_of(data, path), _announced_in(data, path)
            except FileNotFoundError:
                continue
            except RecordError as error:
                damaged[path] = error
                since = [serial for term, serial in serials.items() if term >= number]
                pairs += [(number, min(since) - 1)] if since else []
                continue
            pairs = [*found, *reversed(pairs)]
            announced |= {run: (number, names)} if names is not None else {}
            break
        limits |= {run: tuple(pairs)} if pairs else {}
    return limits, announced, damaged


def _limits_of(data: object, path: str) -> tuple[tuple[int, int], ...]:
    pairs = data.get("limits") if isinstance(data, dict) else None
    if isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(number) is int and number >= 0 for number in pair)
        for pair in pairs
    ):
        return tuple((term, serial) for term, serial in pairs)
    msg = f"{path}: 'limits' is {pairs!r:.100}; expected a list of [term, serial]"
    raise RecordError(msg)


def _announced_in(data: dict[str, Any], path: str) -> frozenset[str] | None:
    """Return the names that were announced; None in a file of an earlier version."""
    names = data.get("announced")
    if names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return None if names is None else frozenset(names)
    msg = f"{path}: 'announced' is {names!r:.100}; expected a list of names"
    raise RecordError(msg)


def _read_json(storage: Storage, path: str, trust: HMACKey | None, limit: int = MAX_RECORD_BYTES) -> Any:
    data = parse_json(read_small(storage, path, limit + 1), path, limit)
    check_signature(data, path, trust)
    return data


@attrs.define
class Term:
    """One term of a run, which this process holds or held."""

    storage: Storage
    run: str
    label: str
    number: int
    owner: str
    beat_s: float
    """Seconds between two heartbeats."""
    trust: HMACKey | None = None
    before: str = ""
    """Owner of the term before, if that was not released: its changes are read even if no listing shows them yet."""
    fenced: str = attrs.field(default="", init=False)
    """Why this process must end, once a check has found a higher term."""

    @property
    def folder(self) -> str:
        """Where its files are."""
        return f"{TERMS}/{key_of(self.run, self.label)}"

    def check(self) -> None:
        """Raise `FencedError` if another process holds a higher term."""
        if self.fenced or self.storage.list(f"{self.folder}/{self.number + 1}.json"):
            self.fenced = self.fenced or self._fenced_text()
            raise FencedError(self.fenced)

    def check_listed(self, files: Iterable[str]) -> None:
        """Do as `check` if a listing has a higher term."""
        if TermFiles.of(files, key_of(self.run, self.label)).highest > self.number:
            self.check()

    def _fenced_text(self) -> str:
        found = TermFiles.of(self.storage.list(self.folder), key_of(self.run, self.label))
        number = max(found.highest, self.number + 1)
        holder = read_claim(self.storage, self.folder, number, self.trust)
        return (
            f"{holder} has taken over run {self.run!r} in {self.storage} (term {number}; this process had term "
            f"{self.number}). This process must not write there any more, and has to end. Its checkpoints from before "
            "the takeover are kept, later ones are listed as abandoned"
        )

    def has_replaced(self, owner: str) -> bool:
        """Return whether the owner held an earlier term."""
        return self._earlier_claim(owner) is not None

    def has_outlasted(self, owner: str) -> bool:
        """Return whether the owner held an earlier term, and ran before this machine was last booted."""
        claim = self._earlier_claim(owner) if is_of_host(owner, self.owner) else None
        return claim is not None and claim.has_ended

    def _earlier_claim(self, owner: str) -> Claim | None:
        """Return the owner's claim. Reads the claims one by one, the newest first."""
        found = TermFiles.of(self.storage.list(self.folder), key_of(self.run, self.label))
        claims = (read_claim(self.storage, self.folder, n, self.trust) for n in found.claimed if n < self.number)
        return next((claim for claim in claims if claim.owner == owner), None)

    def limit(self, limits: Iterable[tuple[int, int]], announced: Iterable[str]) -> None:
        """Let the records of lower terms count up to these serials only: ``(term, serial)``, with those of before.

        ``announced`` are the checkpoints that writers of lower terms may still change.
        """
        data = {"schema": SCHEMA, "limits": [list(pair) for pair in limits], "announced": sorted(announced)}
        self.storage.write(f"{self.folder}/{self.number}.limits", json.dumps(signed(data, self.trust)).encode())

    def release(self) -> None:
        """Let the next process go on at once."""
        if not self.fenced:
            self.storage.write(f"{self.folder}/{self.number}.end", b"")

    def beat(self, storage: Storage, number: int, status: str = "") -> None:
        """Write a heartbeat, through a storage that this thread may use. ``status`` is one line for people."""
        data = f"{number}\n{status}".rstrip().encode()
        put(storage, f"{self.folder}/{self.number}.beat", data, durable=False)


@attrs.frozen
class Claim:
    """Who holds a term."""

    owner: str = ""
    run: str = ""
    label: str = ""
    since: str = "an unknown time"
    machine: str = ""
    beat_s: float = 0.0
    """Seconds between two heartbeats."""
    policy: str = ""
    """The holder's policy as YAML, for commands; empty if it is not known. No manager uses it."""

    def __str__(self) -> str:
        pid = self.owner.split("~")[1] if "~" in self.owner else "of an unknown writer"
        where = "this host" if is_here(self.owner) else f"host {host_of(self.owner) or 'unknown'}"
        return f"process {pid} on {where} (since {self.since})"

    @property
    def has_ended(self) -> bool:
        """Whether the holder's process certainly does not run any more."""
        return has_ended(self.owner, lambda: self.machine)


def read_claim(storage: Storage, folder: str, number: int, trust: HMACKey | None) -> Claim:
    """Return who has claimed a term; an unknown one if the claim cannot be read or trusted."""
    with contextlib.suppress(FileNotFoundError, RecordError):
        data = _read_json(storage, f"{folder}/{number}.json", trust)
        if isinstance(data, dict):
            texts = {key: str(data.get(key, "")) for key in ("owner", "run", "label", "since", "machine", "policy")}
            return Claim(**texts, beat_s=as_number(data.get("beat_s")) or 0.0)
    return Claim()


def read_beat(storage: Storage, folder: str, number: int) -> bytes:
    """Return the number in the last heartbeat of a term, or another text that changes with each heartbeat."""
    path = f"{folder}/{number}.beat"
    try:
        return read_small(storage, path, MAX_STATUS_BYTES).partition(b"\n")[0]
    except FileNotFoundError:
        return b""
    except RecordError:  # If it cannot be read, its version shows that it changes.
        return b"".join(found.version.encode() for found in storage.list(path).values())


def read_status(storage: Storage, folder: str, number: int) -> str:
    """Return the status in the last heartbeat of a term; empty if there is none."""
    try:
        data = read_small(storage, f"{folder}/{number}.beat", MAX_STATUS_BYTES)
    except (FileNotFoundError, RecordError):
        return ""
    return data.decode(errors="replace").partition("\n")[2]
