"""Goes on with a run, from a checkpoint that is selected and loaded, or from the state that a host has saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import attrs

from checkpointer._display import some_of
from checkpointer._validation import as_index
from checkpointer.commit.directory import Directory
from checkpointer.errors import NotFoundError, NoValidCheckpointError, RecordError, RestoreError
from checkpointer.policy.policy import Policy
from checkpointer.records.record import SCHEMA, Line, Progress, Record
from checkpointer.restore.fallback import load_first_valid
from checkpointer.restore.fetch import MirrorSnapshot
from checkpointer.restore.load import Restored
from checkpointer.restore.select import check_empty, select


def go_to(
    which: str | int | None,
    directory: Directory,
    found: MirrorSnapshot,
    contents: Literal["full", "any"],
    load: Callable[[Record], Restored],
    *,
    strict: bool = False,
) -> Restored | None:
    """Load a checkpoint, fetched from the mirror if necessary, and let the directory go on from there.

    Arguments, result and errors are those of `CheckpointManager.restore`. With ``strict`` files without a record are an
    error if there is no checkpoint.
    """
    with _fenced_first(directory):
        view = directory.lines.widened(found.records.values())
        policy = directory.policy
        directory.lines.check_step(which, view.run)
        with _naming(found.problems):
            candidates = select(which, policy, view, contents, damaged=directory.damaged)
        if candidates and not _is_name(which, policy):
            directory.lines.say_chosen(candidates[0])
        holds = directory.hold(candidates[0].run) if candidates and directory.writes else False
        if holds or (not candidates and view.aside and directory.look_again()):
            # Now this process holds the run, or a live one has changed its checkpoints during the listing.
            return go_to(which, directory, found, contents, load, strict=strict)
        if not isinstance(which, int) and not _is_name(which, policy):
            bad = (*map(str, directory.damaged.values()), *found.problems)
            try:
                restored = load_first_valid(
                    candidates, partial(found.load, directory, load), directory.contents.set_aside, bad
                )
            except NoValidCheckpointError:
                # A live run may have retired them for newer ones meanwhile.
                again = None
                if directory.look_again():
                    with contextlib.suppress(NotFoundError):
                        again = go_to(which, directory, found, contents, load, strict=strict)
                if again is None:
                    raise
                return again
            if restored is None:
                check_empty(which, policy, view, directory.storage if strict else None)
                _warn_of_abandoned(directory)
                return None
        else:
            restored = found.load(directory, load, candidates[0])
        directory.lines.resume(restored.record, protect=isinstance(which, int) or which not in (None, "last"))
        return restored


def find(which: str | int | None, directory: Directory) -> Record | None:
    """Return the checkpoint of the directory that `go_to` would try first, weights included. Changes nothing."""
    view = directory.lines.view
    directory.lines.check_step(which, view.run)
    found = select(which, directory.policy, view, "any", damaged=directory.damaged)
    if found and not _is_name(which, directory.policy):
        directory.lines.say_chosen(found[0])
    return found[0] if found else None


def _is_name(which: str | int | None, policy: Policy) -> bool:
    return isinstance(which, str) and which not in ("last", "best", *policy.aliases)


def _warn_of_abandoned(directory: Directory) -> None:
    """Warn if training starts over although a process that was replaced has saved something."""
    manifest = directory.manifest
    late = [r.name for r in manifest.records if r.label == manifest.label and not manifest.is_of_holder(r)]
    if late:
        msg = (
            f"training starts over, because {some_of(late)} in {directory.storage} are abandoned: another process had "
            "taken over their run. To go on from one of them, restore it by its name or step"
        )
        directory.contents.warn_once("abandoned", msg)


@contextlib.contextmanager
def _naming(problems: Sequence[str]) -> Iterator[None]:
    """If a checkpoint is not found, say what could not be looked at."""
    try:
        yield
    except NotFoundError as error:
        if not problems:
            raise
        msg = f"{error}; not looked at: {'; '.join(problems)}"
        raise NotFoundError(msg) from error


@contextlib.contextmanager
def _fenced_first(directory: Directory) -> Iterator[None]:
    """If another process has taken over the run, raise that instead of a `RestoreError`: it is the reason."""
    try:
        yield
    except RestoreError:
        directory.journal.check_term()
        raise


@attrs.frozen(kw_only=True)
class HostState:
    """The state of a manager in a checkpoint of its host, from which the run can go on."""

    run: str
    line: Line
    step: int
    """The last observed step."""
    since: Progress
    """The point from which the trigger counts."""
    owed: str
    """The reason of an unanswered due point; empty if there is none."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state as primitives."""
        return {
            "schema": SCHEMA,
            "run": self.run,
            "line": [list(fork) for fork in self.line],
            "step": self.step,
            "since": self.since.to_dict(),
            "owed": self.owed,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> HostState:
        """Return the state that `to_dict` has written. Raises `RecordError` for other data."""
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


def go_on(host: HostState, directory: Directory, found: MirrorSnapshot, source: str) -> Progress:
    """Let the directory go on with the run at the host's step; return the point from which the trigger counts."""
    if directory.writes:
        directory.hold(host.run)
    directory.lines.widened(found.records.values())
    for problem in found.problems:
        directory.contents.warn_once(problem, f"went on without {problem}")
    directory.lines.resume_run(host.run, host.line, host.step, source)
    saved = directory.manifest.at_step(host.step)
    # The host may have taken the state before this step was saved here, or before the metrics of its epoch were added.
    return host.since.later(saved.progress) if saved else host.since
