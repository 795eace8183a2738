"""A small training for tests that break its disk. It prints the acknowledged steps without the ``write`` syscall."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from checkpointer import CheckpointManager, EverySteps, KeepBest, Naming, Policy
from checkpointer.errors import SaveError
from checkpointer.ports import Storage
from checkpointer.restore.load import verify
from checkpointer.storage import open_storage
from support.plain_format import PlainFormat

FOREIGN = "theirs.bin"
KEPT = 2
SAVES = 4
WARM = 2


def loss_of(step: int) -> float:
    """Return a loss that falls and rises, so that most saves retire a checkpoint."""
    return float(step * 7919 % 101)


def policy_of(last: Literal["link", "copy"] = "link", template: str | None = None) -> Policy:
    """Return the policy of this training."""
    return Policy(EverySteps(1), [KeepBest(KEPT, "loss", mode="min")], last=last, best="link", name=Naming(template))


class Run:
    """A manager whose state is its step and some filler."""

    def __init__(
        self, directory: str | os.PathLike[str] | Storage, policy: Policy, filler: int = 10_000, **kwargs: Any
    ) -> None:
        self.step = 0
        self.filler = "x" * filler
        self.manager = CheckpointManager(directory, policy, state=self.state, format=PlainFormat(), **kwargs)

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "filler": self.filler}

    def observe(self, step: int) -> Any:
        self.step = step
        return self.manager.observe({"loss": loss_of(step)}, step=step, epoch=0, epoch_end=False)


def check_survivor(
    directory: str | os.PathLike[str], acknowledged: Iterable[int], policy: Policy, clue: str = ""
) -> set[int]:
    """Check that the required checkpoints restore, that foreign files are unchanged, and that saving goes on.

    A new manager opens the directory, as after a restart. The best and the newest of all acknowledged or recorded
    checkpoints are required. Returns the recorded steps before the new save.
    """
    folder = Path(directory)
    acknowledged = list(acknowledged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run(folder, policy)
        there = {record.step: record for record in run.manager.records}
        whole = {step for step, record in there.items() if _is_whole(folder, record)}
        newest = max(acknowledged, default=0)
        # An unacknowledged save may exist too. If it is complete, the checkpoints that it outranks may be retired.
        candidates = {*acknowledged, *whole}
        must = {*sorted(candidates, key=loss_of)[:KEPT], max(candidates, default=0)}
        assert must & set(acknowledged) <= whole, f"{clue}: {sorted(must)} of {acknowledged}, whole are {whole}"
        restored = run.manager.restore()
        assert restored is not None or not acknowledged, clue
        if restored is not None:
            assert restored.step >= newest, f"{clue}: restored {restored.step} of {acknowledged}"
            assert restored.step == restored.state["step"], clue
        following = max([newest, *there, 0]) + 1
        assert run.observe(following), clue
        assert following == run.manager.restore().step, clue  # type: ignore[union-attr]
        names = {record.name for record in run.manager.records}
        run.manager.close()
    _check_tidy(folder, names, policy, clue)
    return set(there)


def _is_whole(folder: Path, record: Any) -> bool:
    try:
        verify(open_storage(folder, ""), record)
    except Exception:
        return False
    return True


def _check_tidy(folder: Path, names: set[str], policy: Policy, clue: str) -> None:
    assert b"mine" == (folder / FOREIGN).read_bytes(), clue
    assert not (folder / ".checkpointer/staging").exists(), f"{clue}: {list((folder / '.checkpointer').rglob('*'))}"
    payloads = {path.name for path in folder.glob("*.ckpt")}
    aliases = {policy.name.last_file, policy.name.best_file}
    assert names - aliases == payloads - aliases, f"{clue}: {names} on record, {payloads} in the folder"
    assert len(names) <= KEPT + 2, f"{clue}: {names}"
    staged = [path for path in folder.rglob("*") if "staging" in path.parts]
    assert not staged, clue


def report(*parts: object) -> None:
    """Print a line with ``writev``, which these tests do not break."""
    os.writev(1, [(" ".join(map(str, parts)) + "\n").encode()])


def main(directory: str, last: Literal["link", "copy"], log: str | None = None) -> None:
    """Save a few times, wait for a line on stdin, and save again while the disk may break."""
    warnings.showwarning = lambda message, *_, **__: report("warned", str(message).replace("\n", " "))
    warnings.simplefilter("always")
    run = Run(directory, policy_of(last))
    for step in range(1, WARM + SAVES + 1):
        if step == WARM + 1:
            report("ready")
            sys.stdin.readline()
        try:
            acknowledged = run.observe(step)
        except SaveError as error:
            report("failed", step, repr(error.__cause__ or error))
            continue
        if acknowledged:
            report("saved", step, os.stat(log).st_size if log else 0)
    report("done")
    run.manager.close()
    report("closed")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
