"""Who trains into a folder, and which checkpoint is being written: what a later process must know after a kill."""

from __future__ import annotations

import json
from typing import Any, Final

import attrs

from checkpointer.errors import RecordError
from checkpointer.index import HOME, parse_json, read_bounded
from checkpointer.owner import is_live
from checkpointer.ports import Storage

__all__ = ["Claim"]

_PATH: Final = f"{HOME}/transformers.json"


@attrs.frozen(kw_only=True)
class Claim:
    """A note in the folder, replaced in one step each time."""

    owner: str = ""
    """Process that trains."""
    writing: str = ""
    """The checkpoint that the Trainer is writing under its final name, and that counts once it has a record."""

    @property
    def is_live(self) -> bool:
        """Whether that process certainly lives."""
        return bool(self.owner) and is_live(self.owner)

    def put(self, storage: Storage) -> None:
        """Write it."""
        storage.write(_PATH, json.dumps(attrs.asdict(self)).encode())

    @classmethod
    def of(cls, storage: Storage) -> Claim:
        """Read what the folder says."""
        try:
            data: Any = parse_json(read_bounded(storage, _PATH), _PATH)
        except (FileNotFoundError, RecordError):
            return cls()
        known = {key: value for key, value in data.items() if isinstance(value, str)} if isinstance(data, dict) else {}
        return cls(owner=known.get("owner", ""), writing=known.get("writing", ""))
