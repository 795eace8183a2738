"""Which process trains into a folder, and which checkpoint it is writing: a later process reads it after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import attrs

from checkpointer.commit.index import HOME, parse_json, read_bounded
from checkpointer.errors import RecordError
from checkpointer.ports import Storage

_PATH: Final = f"{HOME}/transformers.json"


@attrs.frozen(kw_only=True)
class Claim:
    """A small file in the folder, replaced in one step each time."""

    owner: str = ""
    """The process that trains."""
    writing: str = ""
    """The checkpoint that the Trainer is writing under its final name; it counts once it has a record."""
    ranks: int = 1
    """How many processes write it."""
    state: Mapping[str, Any] = attrs.field(factory=dict)
    """The manager's state once it is written, because a killed training may not have put it into the checkpoint."""

    def put(self, storage: Storage) -> None:
        """Write it."""
        storage.write(_PATH, json.dumps(attrs.asdict(self)).encode())

    @classmethod
    def of(cls, storage: Storage) -> Claim:
        """Read the folder's claim."""
        try:
            data: Any = parse_json(read_bounded(storage, _PATH), _PATH)
        except (FileNotFoundError, RecordError):
            return cls()
        known = data if isinstance(data, dict) else {}
        kinds = {"owner": str, "writing": str, "ranks": int, "state": dict}
        return cls(**{key: known[key] for key, kind in kinds.items() if type(known.get(key)) is kind})
