"""Kills a Trainer at every n-th change that its sixth step's save makes on the disk, and resumes with another one.

One process imports everything, and each training is a fork of it. It prints a line of JSON for each kill.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from hf_tiny import At, make_trainer, weights_of
from transformers import Trainer, TrainerCallback

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy

POLICY = Policy(EverySteps(3), [KeepLast(1)], last="link")
KILLED = 9
CALLS = {"open", "mkdir", "write", "close", "rename", "replace", "unlink", "rmdir", "symlink", "link", "__exit__"}
CALLS |= {"serialize_file", "write_record", "write_end_of_file", "remove", "flush", "writelines"}
"""C functions that may change files."""


class KillAt(TrainerCallback):
    """Ends the process when the files have changed for the n-th time since the save began."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory, self.left, self.seen = directory, count, snapshot(directory)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            self.seen = snapshot(self.directory)
            sys.setprofile(self.look)
        if state.global_step == 6:
            sys.setprofile(None)

    def look(self, frame: Any, event: str, function: Any) -> None:
        if event != "c_return" or getattr(function, "__name__", "") not in CALLS:
            return
        now = snapshot(self.directory)
        if now != self.seen:
            self.seen, self.left = now, self.left - 1
            if not self.left:
                os._exit(KILLED)


def snapshot(directory: Path) -> dict[str, int]:
    """Return the size of each file, folder and link."""
    found, folders = {}, [os.fspath(directory)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                found[entry.path] = entry.stat(follow_symlinks=False).st_size
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return found


def forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a fork, and return its exit status."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(directory: Path, attached: bool, report: Path, *killing: TrainerCallback) -> None:
    """Train to the end, from the newest checkpoint if there is one, and report the result."""
    warnings.simplefilter("ignore")
    trainer = make_trainer(directory, POLICY, attached=attached, max_steps=9, callbacks=killing)
    result = resumed(trainer, directory)
    kept = sorted(record.name for record in CheckpointManager(directory).records)
    report.write_text(json.dumps({**result, "kept": kept}))


def resumed(trainer: Trainer, directory: Path) -> dict[str, Any]:
    """Train from the newest checkpoint, and return the step where it began and a digest of its weights."""
    begins: list[int] = []

    class Begins(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begins.append(state.global_step)

    trainer.add_callback(Begins())
    trainer.train(resume_from_checkpoint=bool(list(directory.glob("checkpoint-*"))))
    weights = b"".join(tensor.numpy().tobytes() for tensor in weights_of(trainer).values())
    return {"begin": begins[0], "weights": xxhash.xxh3_128_hexdigest(weights)}


def tear(directory: Path) -> bool:
    """Truncate the last written file without a record to half, as a kill within the writer's own code would."""
    torn = directory / "checkpoint-6"
    if not torn.is_dir() or (directory / ".checkpointer/records/checkpoint-6.json").exists():
        return False
    newest = max(torn.iterdir(), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None or not newest.stat().st_size:
        return False
    os.truncate(newest, newest.stat().st_size // 2)
    return True


def kill_and_resume(base: Path, attached: bool, count: int, torn: bool) -> dict[str, Any] | None:
    """Return the result of the resume; None if the save ended before the kill, or no file could be truncated."""
    directory = base.with_name(f"{base.name}-{count}-{torn}")
    shutil.copytree(base, directory, symlinks=True)
    report = directory.with_suffix(".json")
    status = forked(lambda: train(directory, attached, report, KillAt(directory, count)))
    if status == 0:
        return None
    assert status == KILLED, status
    if torn and not tear(directory):
        return {}
    acknowledged = sorted(record.name for record in CheckpointManager(directory).records)
    left = sorted(path.name for path in directory.iterdir())
    status = forked(lambda: train(directory, attached, report))
    result = json.loads(report.read_text()) if status == 0 else {}
    aside = sorted(path.name for path in directory.iterdir() if path.name.startswith("incomplete-"))
    shutil.rmtree(directory)
    return {**result, "count": count, "torn": torn, "status": status, "had": acknowledged, "left": left, "aside": aside}


def main(folder: str, how: str, every: str, first: str = "1") -> None:
    base, attached = Path(folder, how), how != "plain"
    report = base.with_suffix(".json")
    unbroken = Path(folder, f"{how}-unbroken")
    assert 0 == forked(lambda: train(unbroken, attached, report))
    print(json.dumps(json.loads(report.read_text())), flush=True)
    assert KILLED == forked(lambda: train(base, attached, report, At(3, lambda: os._exit(KILLED))))
    for torn in (False,) if attached else (False, True):
        # Torn files are tried half as often, because a kill leaves whole writes more often.
        step = int(every) * (1 + torn)
        count = int(first)
        while (result := kill_and_resume(base, attached, count, torn)) is not None:
            if result:
                print(json.dumps(result), flush=True)
            count += step


if __name__ == "__main__":
    main(*sys.argv[1:])
