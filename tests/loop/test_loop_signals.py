"""Signals, exceptions and requests from outside: answered at a step boundary, and never swallowed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from checkpointer_torch import Loop
from checkpointer_torch.signals import Requests
from small import POLICY, Small, run, say_at
from support.gated import GatedStorage

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepEvery, KeepLast, Policy
from checkpointer.errors import PolicyError
from checkpointer.hosts.grace import Grace

RARELY = Policy(EverySteps(1000), [KeepLast(1)])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run that nothing interrupts ends with."""
    return run(tmp_path_factory.mktemp("unbroken"), None, {})[1]


def names(directory: Path) -> list[str]:
    """Return the checkpoints that are there."""
    return sorted(record.name for record in CheckpointManager(directory).records)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGUSR1, -signal.SIGUSR1), (signal.SIGINT, 1)]
)
def test_a_signal_within_a_step_is_rescued_at_its_end_and_ends_the_process_as_ever(
    tmp_path: Path, unbroken: str, number: int, code: int
) -> None:
    """The parent of the process sees the status that the signal gives by default, and the run goes on exactly."""
    assert (code, "") == run(tmp_path, say_at("within", 5, number), {})
    assert "rescue-step=5.ckpt" in names(tmp_path)
    assert (code, "") == run(tmp_path, say_at("before", 11, number), {})
    assert "rescue-step=11.ckpt" in names(tmp_path)
    assert (0, unbroken) == run(tmp_path, None, {})
    assert [] == [name for name in names(tmp_path) if name.startswith("rescue")]


@pytest.mark.slow
def test_a_signal_in_the_validation_waits_for_the_end_of_the_epoch(tmp_path: Path, unbroken: str) -> None:
    """The epoch trigger saves there, so that there is nothing left to rescue."""
    assert (-signal.SIGTERM, "") == run(tmp_path, say_at("end", 7, signal.SIGTERM), {})
    assert ["epoch=0-step=7.ckpt"] == names(tmp_path)
    assert (0, unbroken) == run(tmp_path, None, {})


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, unbroken: str) -> None:
    """It strikes within the step, so that nothing is saved of it."""
    assert (1, "") == run(tmp_path, say_at("within", 5, signal.SIGINT, signal.SIGINT), {})
    assert ["epoch=0-step=3.ckpt"] == names(tmp_path)
    assert (0, unbroken) == run(tmp_path, None, {})


def wait_for_ever() -> None:
    """Be a process of the user's own."""
    time.sleep(1000)


@pytest.mark.slow
def test_a_forked_process_can_be_ended(tmp_path: Path) -> None:
    """It has inherited our handlers, and the signal is meant for it alone."""
    fork = multiprocessing.get_context("fork")
    with Loop(tmp_path, RARELY) as loop:
        within, after = (fork.Process(target=wait_for_ever, daemon=True) for _ in range(2))
        for process in (within, after):
            process.start()
        time.sleep(0.1)
        within.terminate()
        within.join(60.0)
        assert -signal.SIGTERM == within.exitcode
        assert "" == loop.stopped
    after.terminate()
    after.join(60.0)
    assert -signal.SIGTERM == after.exitcode


def test_an_earlier_handler_gets_the_signal_after_the_rescue_and_its_place_back(tmp_path: Path) -> None:
    """With a handler of one's own the program goes on after the block, and `stopped` says why it ended."""
    received: list[list[str]] = []

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(names(tmp_path))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        loop = Loop(tmp_path, RARELY, seen=0)
        with loop:
            for _ in loop.epochs(2):
                for number in loop.batches(range(5)):
                    if number == 2:
                        signal.raise_signal(signal.SIGUSR1)
                    assert number <= 2
                    loop.step()
        assert [["rescue-step=3.ckpt"]] == received
        assert "SIGUSR1 at step 3; saved as rescue-step=3.ckpt" == loop.stopped
        assert handler is signal.getsignal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_was_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup: the signal is not for the training."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Loop(tmp_path, RARELY) as loop:
            assert signal.SIG_IGN == signal.getsignal(signal.SIGUSR1)
            for _ in loop.epochs(1):
                for _ in loop.batches(range(3)):
                    signal.raise_signal(signal.SIGUSR1)
                    loop.step()
        assert (3, "") == (loop.progress.step, loop.stopped)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("numbers", ["SIGTERM", signal.SIGTERM, [1000]])
def test_what_is_no_signal_is_refused_at_once(numbers: Any) -> None:
    """A name, one number, a number that no signal has."""
    for given in ({"stop_on": numbers}, {"save_on": numbers}):
        with pytest.raises(PolicyError, match=r"(stop|save)_on is .*; expected numbers of signals, such as \(signal"):
            Loop(None, Policy(EverySteps(1), [KeepLast(1)]), **given)


def test_another_thread_trains_without_signals(tmp_path: Path) -> None:
    """Python gives signals to the main thread only, and says so with an error."""
    before = signal.getsignal(signal.SIGTERM)
    steps = []

    def work() -> None:
        with Loop(tmp_path, RARELY) as loop:
            for _ in loop.epochs(1):
                for _ in loop.batches(range(3)):
                    loop.step()
                    assert before is signal.getsignal(signal.SIGTERM)
            steps.append(loop.progress.step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [3] == steps


@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_save_can_be_asked_for_without_stopping(tmp_path: Path, how: str) -> None:
    """From a shell: the next boundary saves, the file goes, and the training goes on."""
    asked = tmp_path / ".checkpointer/save-now"
    there = {}
    with Loop(tmp_path, RARELY) as loop:
        for _ in loop.epochs(1):
            for number in loop.batches(range(6)):
                if number == 2 and how == "signal":
                    signal.raise_signal(signal.SIGUSR2)
                if number == 2 and how == "file":
                    loop._requests.look_at = 0.0
                    asked.parent.mkdir(exist_ok=True)
                    asked.touch()
                loop.step()
                there[loop.progress.step] = names(tmp_path)
    assert [[], [], *[["rescue-step=3.ckpt"]] * 4] == list(there.values())
    assert not asked.exists()
    assert "" == loop.stopped


def test_the_file_is_looked_for_once_a_second_at_most(tmp_path: Path) -> None:
    """The hot path compares a clock; a file that cannot be removed asks once."""
    file = tmp_path / "save-now"
    requests = Requests((), (), str(file), grace=Grace())
    began = time.monotonic()
    requests.look()
    assert began + 1.0 <= requests.look_at <= time.monotonic() + 1.0
    file.touch()
    for is_new in (True, False, False):
        requests.look()
        assert is_new == requests.is_pending
        assert ("the file save-now" if is_new else "") == requests.take()[1]
    os.utime(file, (0, 0))
    requests.look()
    assert requests.is_pending, "it was put there again"


def test_an_exception_is_rescued_and_passes_unchanged(tmp_path: Path) -> None:
    """Within a step the state is that of the moment, and a resume says so; a Loop has nothing to add to the error."""
    error = ZeroDivisionError("mine")

    def fail(where: str, step: int) -> None:
        if (where, step) == ("within", 5):
            raise error

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        Small().train(tmp_path, tick=fail, policy=RARELY)
    assert error is caught.value
    assert error.__cause__ is None
    assert ["rescue-step=4.ckpt"] == names(tmp_path)
    small = Small()
    loop = Loop(tmp_path, RARELY, **small.objects)
    with loop, pytest.warns(CheckpointerWarning, match="within step 5: .* are in it"):
        assert 4 == loop.resume().step


def test_an_exception_of_the_data_is_rescued_exactly(tmp_path: Path) -> None:
    """While the next batch is fetched the loop is at a boundary: the run goes on as if nothing had been."""

    def data(bad: int | None) -> Iterator[int]:
        for number in range(6):
            if number == bad:
                raise OSError("the disk is gone")
            yield number

    def train() -> None:
        with Loop(tmp_path, RARELY) as loop:
            for _ in loop.epochs(1):
                for _ in loop.batches(data(4)):
                    loop.step()

    with pytest.raises(OSError, match="disk is gone"):
        train()
    with Loop(tmp_path, RARELY) as loop:
        assert 4 == loop.resume().step
        assert [4, 5] == [number for _ in loop.epochs(1) for number in loop.batches(data(None))]


def test_a_rescue_that_may_be_too_late_says_so(tmp_path: Path) -> None:
    """The grace is known, and how long a save takes."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with Loop(tmp_path, Policy(EverySteps(1), [KeepLast(1)]), grace_s=1e-9, w=torch.ones(3)) as loop:
            for _ in loop.epochs(1):
                for number in loop.batches(range(6)):
                    if number == 2:
                        signal.raise_signal(signal.SIGTERM)
                        with pytest.warns(CheckpointerWarning, match=r"0\.0 s are left of the grace of 1e-09 s, and"):
                            loop.step()
                    loop.step()
        assert 3 == loop.progress.step
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_save_of_weights_alone_is_timed_too(tmp_path: Path) -> None:
    """The rescue after it is not said to be late."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    policy = Policy(EverySteps(1), [KeepLast(1)], contents="weights")
    with pytest.warns(CheckpointerWarning, match="cannot resume"):
        loop = Loop(tmp_path, policy, grace_s=600.0, model=torch.nn.Linear(1, 1))
    try:
        with loop:
            for step in loop.steps(3):
                if step == 1:
                    signal.raise_signal(signal.SIGTERM)
                loop.step()
        assert loop.stopped.startswith("SIGTERM at step 2")
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("finished", [0, 1])
def test_after_a_signal_the_writer_thread_is_waited_for_no_longer_than_the_grace(finished: int) -> None:
    """Also if the next save is due at the boundary that answers the signal; the code after the loop still runs."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    storage = GatedStorage()
    storage.shut()
    options = {"background": "wait"}

    def stop() -> str:
        with Loop(storage, Policy(EverySteps(1), [KeepLast(1)]), options=options, grace_s=0.5) as loop:
            for step in loop.steps(3):
                if step == finished:
                    signal.raise_signal(signal.SIGTERM)
                loop.step()
        return loop.stopped

    began = time.monotonic()
    try:
        with (
            pytest.warns(
                CheckpointerWarning, match=r"asked for by SIGTERM failed .*step=1.ckpt is still being written"
            ),
            pytest.warns(CheckpointerWarning, match=r"step=1.ckpt is still being written, and close\(\) stops waiting"),
        ):
            assert stop()
        assert 0.4 < time.monotonic() - began < 30.0
    finally:
        storage.open_gate()
        signal.signal(signal.SIGTERM, before)


def test_a_rescue_that_fails_does_not_hold_the_stop_up(tmp_path: Path) -> None:
    """Older checkpoints hold, and the signal has to be answered."""

    class Broken:
        is_bad = False

        def state_dict(self) -> dict[str, Any]:
            if self.is_bad:
                raise RuntimeError("no state today")
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    broken = Broken()
    try:
        with Loop(tmp_path, POLICY, broken=broken) as loop:
            for _ in loop.epochs(1):
                for _ in loop.batches(range(3)):
                    loop.step()
                broken.is_bad = True
                signal.raise_signal(signal.SIGTERM)
                with pytest.warns(CheckpointerWarning, match="asked for by SIGTERM failed .*no state today"):
                    loop.step()
        assert 4 == loop.progress.step
        assert ["epoch=0-step=3.ckpt"] == names(tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_after_the_last_boundary_is_rescued_and_delivered_at_the_end(tmp_path: Path) -> None:
    """Such as one that comes while the final test is measured."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(names(tmp_path)))
    try:
        # A rule that does not keep the end of the training.
        with Loop(tmp_path, Policy(EverySteps(100), [KeepEvery(steps=100)])) as loop:
            for _ in loop.epochs(1):
                for _ in loop.batches(range(2)):
                    loop.step()
            signal.raise_signal(signal.SIGTERM)
        assert [["rescue-step=2.ckpt"]] == received
    finally:
        signal.signal(signal.SIGTERM, before)
