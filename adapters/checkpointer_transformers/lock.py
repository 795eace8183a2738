"""Which processes train into a folder, and which checkpoint each is writing: a later process reads it after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import attrs

from checkpointer.commit.index import HOME, parse_json, read_bounded
from checkpointer.errors import RecordError
from checkpointer.ports import Storage
from checkpointer.records.manifest import Limits
from checkpointer.storage.owner import has_ended, host_of, machine

_FOLDER: Final = f"{HOME}/transformers"


@attrs.frozen(kw_only=True)
class Claim:
    """A small file of one process. No other process writes it, so it stays true after a takeover.

    The Trainer writes a checkpoint under its final name. So this is an announcement, as in `checkpointer.commit.terms`:
    first the process writes here which checkpoint, then it looks whether another process has taken over the run.
    """

    owner: str = ""
    """The process that trains."""
    machine: str = attrs.field(factory=machine)
    term: int = 0
    """The term of the run that the process held."""
    writing: str = ""
    """The checkpoint that the Trainer is writing under its final name; it counts once it has a record."""
    ranks: int = 1
    """How many processes write it."""
    state: Mapping[str, Any] = attrs.field(factory=dict)
    """The manager's state once it is written, because a killed training may not have put it into the checkpoint."""

    def put(self, storage: Storage) -> None:
        """Write it."""
        storage.write(_path(self.owner), json.dumps(attrs.asdict(self)).encode())

    def remove(self, storage: Storage) -> None:
        """Remove its file."""
        storage.delete(_path(self.owner))

    @property
    def run(self) -> str:
        """The run of the checkpoint that is being written; empty if none is."""
        return str(self.state.get("run", ""))

    @property
    def has_ended(self) -> bool:
        """Return whether the process certainly does not run any more."""
        return has_ended(self.owner, lambda: self.machine)

    def why_doubtful(self, limits: Limits, term: int | None = None) -> str:
        """Return why nothing may rely on the checkpoint that is being written, whole or not; empty if it may count.

        Args:
            limits: The limits of the directory. They have each term that went on with a run.
            term: The term that this process holds now; None if it holds none.
        """
        pid = self.owner.split("~")[1] if self.owner.count("~") == 3 else self.owner
        process = f"process {pid} on host {host_of(self.owner)}"
        if not self.has_ended:
            return f"{process} may still write it"
        later = [number for number, _ in limits.get((self.run, ""), ()) if self.term < number != term]
        return f"another process had taken over the run when {process} wrote it" if later else ""

    @classmethod
    def all_of(cls, storage: Storage) -> list[Claim]:
        """Read the folder's claims, those of the newest terms first."""
        found = [cls._read(storage, path) for path in storage.list(_FOLDER)]
        return sorted(filter(None, found), key=lambda claim: -claim.term)

    @classmethod
    def _read(cls, storage: Storage, path: str) -> Claim | None:
        try:
            data: Any = parse_json(read_bounded(storage, path), path)
        except (FileNotFoundError, RecordError):
            return None
        known = data if isinstance(data, dict) else {}
        kinds = {"owner": str, "machine": str, "term": int, "writing": str, "ranks": int, "state": dict}
        claim = cls(**{key: known[key] for key, kind in kinds.items() if type(known.get(key)) is kind})
        return claim if _path(claim.owner) == path else None


def _path(owner: str) -> str:
    return f"{_FOLDER}/{owner}.json"
