"""How far a training is: what each heartbeat says, and what ``checkpointer watch`` reads."""

from __future__ import annotations

import json
import math
from typing import Any

import attrs

from checkpointer.errors import RecordError
from checkpointer.records.codec import as_number, parse_json


@attrs.frozen(kw_only=True)
class TrainingStatus:
    """The state of a training at one moment, as its process sees it.

    Example:
        >>> status = TrainingStatus(time=1.5, step=300, due="step 400")
        >>> TrainingStatus.from_json(status.to_json()) == status
        True
    """

    time: float
    """When, in seconds since the Unix epoch, by the clock of the training's machine."""
    step: int = -1
    """The newest step that the loop reported; -1 before the first report."""
    due: str = ""
    """Before what nothing is due, such as "step 400"; empty if that is not known."""
    due_step: float = math.inf
    """The step at which the next save is due."""
    due_time: float = math.inf
    """The time at which it is due, in seconds since the Unix epoch."""
    writing: str = ""
    """The checkpoint that is being written; empty if there is none."""
    written: int = 0
    """Bytes of it that are written."""
    expected: int = 0
    """Bytes that it will have, about; 0 if that is not known."""
    mirror: str = ""
    """The mirror, without a password; empty if there is none."""
    behind: int = 0
    """Checkpoints that the mirror does not have yet."""
    behind_bytes: int = 0
    """Their bytes."""
    mirror_error: str = ""
    """The error of the last copy; empty if it succeeded."""

    def to_json(self) -> str:
        """Return one line, without what is not known."""
        data = attrs.asdict(self, filter=lambda field, value: value != field.default)
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> TrainingStatus | None:
        """Return what `to_json` wrote, or None for another text, because any program may write a heartbeat."""
        try:
            data = parse_json(text.encode(), "the heartbeat")
        except RecordError:
            return None
        if not isinstance(data, dict):
            return None
        known = {
            field.name: _typed(field.default, data[field.name]) for field in attrs.fields(cls) if field.name in data
        }
        return None if None in known.values() or known.get("time") is None else cls(**known)


def _typed(default: Any, value: Any) -> Any:
    """Return the value if it is of the type of the default, else None."""
    if isinstance(default, str):
        return value if isinstance(value, str) else None
    number = as_number(value)
    if number is None or not math.isfinite(number):
        return None
    return int(number) if isinstance(default, int) else number
