"""Real processes that save to a real S3 server, and ``kill -9``: of them, and of the server."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.kill_me_s3 import policy_of
from support.plain_format import PlainFormat
from support.s3_tools import LARGE, LargeFormat, filesystem, objects, unfinished
from support.sampling import some
from support.servers import SeaweedFS
from support.servers.fixtures import Serve
from support.servers.launching import restart, running
from support.servers.processes import kill

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning, SaveError, StorageError
from checkpointer.storage.retry import Retry

pytestmark = pytest.mark.slow

KILLS = some(200)
IMPATIENT_S = 0.5
ATTEMPTS = 50
"""So many saves of an impatient manager may fail when the server is back, because a loaded machine answers too late."""


class Trainings:
    """Trainings that are killed one after the other; see `kill_me_s3`."""

    def __init__(self, process: subprocess.Popen[str], **arguments: Any) -> None:
        self._process = process
        self._arguments = json.dumps(arguments)
        self.acknowledged = 0

    def run_and_kill(self, delay: float, *, early: bool) -> None:
        """Kill one so many seconds after it began, or after it restored, and hold what it said against the law."""
        assert self._process.stdin is not None
        self._process.stdin.write(self._arguments + "\n")
        self._process.stdin.flush()
        pid = int(self._read()[1])
        said = [] if early else [self._read()]
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        while (line := self._read()) != ["ended"]:
            said.append(line)
        for what, step in said:
            if what == "restored":
                # One save may have become durable without its line being written.
                assert int(step) in (self.acknowledged, self.acknowledged + 1)
            self.acknowledged = int(step)

    def _read(self) -> list[str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        assert line, "it ended by itself; its error is above"
        return line


@contextlib.contextmanager
def trainings(**arguments: Any) -> Iterator[Trainings]:
    command = [sys.executable, "-m", "support.kill_me_s3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Trainings(process, **arguments)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("last", "size", "kills", "delay"),
    [("link", 0, KILLS * 2 // 5, 0.4), ("copy", 0, KILLS * 2 // 5, 0.4), (None, LARGE, KILLS // 5, 0.8)],
    ids=["link", "copy", "multipart"],
)
def test_killed_at_random_instants_nothing_acknowledged_is_lost(
    serve: Serve, last: str | None, size: int, kills: int, delay: float
) -> None:
    """Uploads of ended writers are swept; an upload and objects of others stay."""
    server, dice = serve("s3"), random.Random(20)
    url, options = server.fresh(), dict(server.storage_options)
    bucket, _, prefix = url.partition("://")[2].partition("/")
    filesystem(server).pipe_file(f"{bucket}/{prefix}/theirs.bin", b"mine")
    theirs = {"Bucket": bucket, "Key": f"{prefix}/theirs.ckpt"}
    upload = filesystem(server).call_s3("create_multipart_upload", **theirs)["UploadId"]
    with trainings(url=url, options=options, last=last, size=size) as training:
        for number in range(10 * kills):
            if number >= kills and training.acknowledged > kills // 4:
                break  # A loaded machine needs more kills until enough was saved.
            training.run_and_kill(dice.uniform(0.0, delay), early=number % 4 == 0)
    state = {"step": training.acknowledged + 2}
    payload = LargeFormat(size) if size else PlainFormat()
    with CheckpointManager(
        url, policy_of(last), state=lambda: state, format=payload, storage_options=options
    ) as manager:
        found = manager.restore()
        assert found is not None
        assert found.step in (training.acknowledged, training.acknowledged + 1)
        manager.observe({"loss": 1000.0}, step=training.acknowledged + 2, epoch=0, epoch_end=False)
        names = {record.name for record in manager.records}
        assert min(3, found.step + 1) == len(names)
    there = objects(server, url)
    aliases = {"last.ckpt"} if last else set()
    assert names | aliases | {"theirs.bin"} == {path for path in there if not path.startswith(".checkpointer/")}
    assert training.acknowledged > kills // 4, "too slow to test anything"
    assert [] == [path for path in there if "staging" in path]
    assert ["theirs.ckpt"] == unfinished(server, url)
    assert b"mine" == filesystem(server).cat_file(f"{bucket}/{prefix}/theirs.bin")
    filesystem(server).call_s3("abort_multipart_upload", UploadId=upload, **theirs)


@pytest.mark.parametrize(
    ("deadline_s", "size"),
    [(60.0, 0), (60.0, LARGE), (IMPATIENT_S, 0)],
    ids=["patient", "patient multipart", "impatient"],
)
def test_a_killed_server_loses_nothing_acknowledged(serve: Serve, tmp_path: Path, deadline_s: float, size: int) -> None:
    """The save that it was killed in goes through once it is back, or fails and says so; a later one works."""
    serve("s3")  # Skips where it is not installed.
    is_patient = deadline_s != IMPATIENT_S
    if not is_patient:
        # What could not be retired meanwhile.
        warnings.simplefilter("ignore", CheckpointerWarning)
    dice = random.Random(20)
    payload = LargeFormat(size) if size else PlainFormat()
    state = {"step": 0}
    with running(SeaweedFS, tmp_path) as server, contextlib.ExitStack() as stack:
        url = server.fresh()

        def manager(deadline_s: float) -> CheckpointManager:
            options = {**server.storage_options, "retry": Retry(deadline_s=deadline_s)}
            return CheckpointManager(
                url, policy_of("link"), state=lambda: state, format=payload, storage_options=options
            )

        training = first_opened(lambda: manager(deadline_s))
        acknowledged = failures = 0
        for _ in range(4):
            killer = Restarter(server, dice.uniform(0.0, 0.3))
            killer.start()
            tried = 0
            is_back = False
            while not is_back or (state["step"] != acknowledged and tried < ATTEMPTS):
                tried += is_back
                is_back = killer.is_back.is_set()
                state["step"] += 1
                step = state["step"]
                with contextlib.suppress(*([] if is_patient else [SaveError])):
                    training.observe({"loss": step * 7919 % 101}, step=step, epoch=0, epoch_end=False)
                    acknowledged = step
                failures += step != acknowledged
            killer.join()
            server = killer.server
            stack.callback(kill, server.pids)
            assert step == acknowledged
        assert is_patient == (failures == 0)
        training.close()
        with manager(60.0) as other:
            restored = other.restore()
            assert restored is not None
            assert acknowledged == restored.step == restored.state["step"]
            state["step"] += 1  # Removes what the training could not remove in time.
            assert other.observe({"loss": 1000.0}, step=state["step"], epoch=0, epoch_end=False)
        assert [] == unfinished(server, url)
        assert [] == [path for path in objects(server, url) if "staging" in path]


def first_opened(manager: Callable[[], CheckpointManager]) -> CheckpointManager:
    """Return the first of some managers that the server has answered in time."""
    for _ in range(ATTEMPTS):
        with contextlib.suppress(StorageError):
            return manager()
    return manager()


class Restarter(threading.Thread):
    """Kills a server after so many seconds, and starts it again."""

    def __init__(self, server: SeaweedFS, delay: float) -> None:
        super().__init__()
        self.server = server
        self.delay = delay
        self.is_back = threading.Event()

    def run(self) -> None:
        time.sleep(self.delay)
        try:
            self.server = restart(self.server)
        finally:
            self.is_back.set()
