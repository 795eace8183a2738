"""What Fabric and accelerate have prepared: killed at any batch, stopped by signals, and resumed to the bit."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from checkpointer_torch import Loop
from prepared import BATCHES, EPOCHS, EVERY_STEP, HOSTS, LOADERS, RARELY, Training, scaler, walk
from support.forking import CONTEXT
from support.together import together

from checkpointer.errors import PolicyError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")]

PATIENCE_S = 120.0
ON_RANKS = ("accelerate", "accelerate, scaled", "fabric", "fabric, scaled")
"""The other trainings differ by their loader only, and two ranks try each loader alone."""


@pytest.fixture(scope="module")
def imported() -> Iterator[Callable[..., Any]]:
    """Call functions in a process which imports the hosts once, and which they fork for each training."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(PATIENCE_S)


def forked(host: str, directory: Path, number: int | None = None, where: str = "", batch: int = 0) -> tuple[int, Any]:
    """Train in a process of its own, which sends itself a signal there; return its exit code and what it returns."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(sender, host, directory, number, where, batch))
    process.start()
    sender.close()
    process.join(PATIENCE_S)
    assert process.exitcode is not None
    return process.exitcode, receiver.recv() if process.exitcode == 0 else None


def _train(sender: Connection, host: str, directory: Path, number: int | None, where: str, batch: int) -> None:
    def tick(now: str, given: int) -> None:
        if number is not None and (where, batch) == (now, given):
            os.kill(os.getpid(), number)

    train, options = HOSTS[host]
    sender.send(train(directory, tick, **options))


def strike(host: str, directory: Path) -> list[Any]:
    """Train unbroken; then kill one training within every batch and after every batch, each time resumed."""
    importlib.import_module("torch._dynamo")
    importlib.import_module("accelerate" if host.startswith("accelerate") else "lightning.fabric")
    results = [forked(host, directory / "unbroken")]
    for batch in range(1, EPOCHS * BATCHES + 1):
        results.append(forked(host, directory / "run", signal.SIGKILL, ("within", "after")[batch % 2], batch))
    results.append(forked(host, directory / "run"))
    results.append(forked(host, directory / "signal", signal.SIGTERM, "within", 1))
    results.append(forked(host, directory / "signal", signal.SIGTERM, "within", 8))
    results.append(forked(host, directory / "signal"))
    return results


@pytest.mark.parametrize("host", HOSTS)
def test_killed_at_every_batch_a_prepared_training_ends_with_the_same_weights(
    imported: Callable[..., Any], tmp_path: Path, host: str
) -> None:
    """One process; the loss of a batch that was accumulated and not stepped is computed again."""
    unbroken, *killed, end, first, second, resumed = imported(strike, host, tmp_path)
    code, (steps, stopped, _) = unbroken
    assert (0, 2 * 3, "") == (code, steps, stopped), "a step is two batches, or the last one of an epoch"
    assert [(-signal.SIGKILL, None)] * (EPOCHS * BATCHES) == killed
    assert unbroken == end
    assert [(-signal.SIGTERM, None)] * 2 == [first, second]
    assert unbroken == resumed


def refused(host: str) -> str:
    """Give a Loop an optimizer without its scaler, and return the error."""
    mine = Training()
    optimizer: Any
    if host == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scaler(1)
        optimizer = accelerator.prepare(mine.optimizer)
    else:
        from lightning.fabric import Fabric
        from lightning.fabric.plugins import MixedPrecision

        fabric = Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler(1))])
        _, optimizer = fabric.setup(mine.net, mine.optimizer)
    try:
        Loop(None, RARELY, optimizer=optimizer)
    except PolicyError as error:
        return str(error)
    return ""


def test_an_optimizer_without_its_scaler_is_refused(imported: Callable[..., Any]) -> None:
    """A resume would begin with another scale; the error says how to pass it."""
    for host, how in {"accelerate": "accelerator.scaler", "fabric": "fabric.strategy.precision"}.items():
        expected = "optimizer scales its gradients by a GradScaler, and the Loop was not given it: .*Pass .*=" + how
        assert re.search(expected, imported(refused, host))


def train_on_rank(rank: int, directory: Path, host: str) -> dict[str, Any]:
    """Train unbroken, from each step of that, and stopped by a signal to rank 1."""

    def strike(where: str, batch: int) -> None:
        if (rank, where, batch) == (1, "within", 2):
            os.kill(os.getpid(), signal.SIGTERM)

    train, options = HOSTS[host]
    folder = directory / host
    unbroken = train(folder, lambda *_: None, policy=EVERY_STEP, **options)
    # Not from the last one: rank 0's BatchNorm buffers are saved, and DDP sends them with the next batch.
    saved = sorted(folder.glob("*step=*.ckpt"))[:-1]
    again = [train(None, lambda *_: None, policy=RARELY, source=path, **options) for path in saved]
    signal.signal(signal.SIGTERM, lambda *_: None)
    stopped = train(directory / f"{host} stopped", strike, policy=RARELY, **options)
    resumed = train(directory / f"{host} stopped", lambda *_: None, policy=RARELY, **options)
    return {"unbroken": unbroken, "again": again, "stopped": stopped, "resumed": resumed}


def walk_on_rank(directory: Path, kind: str) -> list[str]:
    """Give a loader's batches, and those after some of the steps; return what differs."""
    folder = directory / "loaders" / kind
    unbroken = walk(folder, kind)
    saved = {int(path.stem.partition("step=")[2]): path for path in folder.glob("*.ckpt")}
    half = len(saved) // 2
    differs = []
    for step in {1, half - 1, half, half + 1}:
        given = walk(None, kind, saved[step])
        if unbroken[step:] != given:
            differs.append(f"{kind} after step {step}: {given[:1]} and not {unbroken[step : step + 1]}")
    return differs


def on_rank(rank: int, directory: Path) -> Any:
    """Do all of it in one process group."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    differs = [text for kind in LOADERS for text in walk_on_rank(directory, kind)]
    return differs, {host: train_on_rank(rank, directory, host) for host in ON_RANKS}


def test_on_two_ranks_prepared_trainings_are_resumed_and_stopped_to_the_bit(tmp_path: Path) -> None:
    """From every step; each kind of loader gives every item once and in order; a signal to one rank stops both."""
    ranks = together(2, on_rank, tmp_path)
    for differs, hosts in ranks:
        assert [] == differs
        for host, runs in hosts.items():
            assert [runs["unbroken"]] * len(runs["again"]) == runs["again"], host
            assert runs["unbroken"] == runs["resumed"], host
            assert runs["stopped"][1].startswith("SIGTERM at step"), host
    (_, one), (_, other) = ranks
    assert {host: runs["stopped"][0] for host, runs in one.items()} == {
        host: runs["stopped"][0] for host, runs in other.items()
    }
