"""Goes on from what was saved: from a checkpoint that is chosen and loaded, or from what a host kept of a manager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import attrs

from checkpointer._validation import as_index
from checkpointer.commit.directory import Directory
from checkpointer.errors import RecordError
from checkpointer.records.record import SCHEMA, Line, Progress, Record
from checkpointer.restore.fetch import MirrorSnapshot
from checkpointer.restore.load import Restored, check_empty, load_first_valid

__all__ = ["HostState", "go_on", "go_to"]


def go_to(
    which: str | int | None,
    directory: Directory,
    found: MirrorSnapshot,
    contents: Literal["full", "any"],
    load: Callable[[Record], Restored],
    *,
    strict: bool = False,
) -> Restored | None:
    """Load a checkpoint, from the mirror if need be, and let the directory go on from there.

    Args:
        which: As for `CheckpointManager.restore`.
        directory: Where it is looked for.
        found: What the mirror holds.
        contents: As for `CheckpointManager.restore`.
        load: Loads a checkpoint that is in the directory.
        strict: Whether files that no record names are an error if there is no checkpoint.

    Returns:
        What ``load`` returned, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: As `CheckpointManager.restore`.
    """
    view = directory.widened(found.records.values())
    policy = directory.policy
    chosen = found.choose(which, policy, view, contents, damaged=directory.damaged)
    if which is None or which in ("last", "best") or which in policy.aliases:
        bad = (*map(str, directory.damaged.values()), *found.problems)
        restored = load_first_valid(chosen, partial(found.load, directory, load), directory.set_aside, bad)
        if restored is None:
            check_empty(which, policy, view, directory.storage if strict else None)
            return None
    else:
        restored = found.load(directory, load, chosen[0])
    directory.resume(restored.record, protect=isinstance(which, int) or which not in (None, "last"))
    return restored


@attrs.frozen(kw_only=True)
class HostState:
    """What a host may keep of a manager in a checkpoint of its own: enough to go on with the run from there."""

    run: str
    line: Line
    step: int
    """The last one observed."""
    since: Progress
    """From when the trigger counts."""
    owed: str
    """Why a due point is still open; empty if none is."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as primitives."""
        return {
            "schema": SCHEMA,
            "run": self.run,
            "line": [list(fork) for fork in self.line],
            "step": self.step,
            "since": attrs.asdict(self.since),
            "owed": self.owed,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> HostState:
        """Return what `to_dict` was called on; `RecordError` for anything else."""
        try:
            return cls(
                run=str(state["run"]),
                step=as_index(state["step"], "step", RecordError),
                line=tuple((int(fork), int(at)) for fork, at in state["line"]),
                since=Progress(**state["since"]),
                owed=str(state["owed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            msg = f"the manager's saved state is {dict(state)!r:.200}; expected what state_dict() returned ({error!r})"
            raise RecordError(msg) from error


def go_on(account: HostState, directory: Directory, found: MirrorSnapshot, source: str) -> Progress:
    """Let the directory go on with the run at the account's step, and return from when the trigger counts."""
    directory.widened(found.records.values())
    for problem in found.problems:
        directory.say_once(problem, f"went on without {problem}")
    directory.resume_run(account.run, account.line, account.step, source)
    saved = directory.manifest.at_step(account.step)
    # The state may lie in what somebody else saved, before this step was saved here or its epoch's end attached.
    return account.since.later(saved.progress) if saved else account.since
