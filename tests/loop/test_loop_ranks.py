"""Several processes: they stop at one step, save what is each one's own, and an error on one is seen as itself."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from checkpointer_torch import Loop
from support.gated import GatedStorage
from support.together import together
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepEvery, KeepLast, Policy
from checkpointer.errors import RanksError

pytestmark = pytest.mark.slow

POLICY = Policy(EverySteps(4), [KeepLast(1)], last="link")
STEPS = 24


class Parallel:
    """A DDP training, whose ranks draw numbers of their own."""

    def __init__(self, rank: int, *, device: str = "cpu") -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.model = nn.parallel.DistributedDataParallel(net)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        data = TensorDataset(torch.arange(96.0).view(24, 4) / 96)
        self.loader = DataLoader(data, 2, sampler=DistributedSampler(data, shuffle=True, seed=1))
        torch.manual_seed(100 + rank)
        random.seed(rank)

    def learn(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (self.model(batch + random.random()) - 1.0).square().mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def digest(self) -> str:
        """Return the weights, and what this rank would draw next."""
        seen = [*self.model.state_dict().values(), torch.get_rng_state()]
        drawn = repr(random.getstate()).encode()
        return xxhash.xxh3_128_hexdigest(b"".join(tensor.numpy().tobytes() for tensor in seen) + drawn)


def train(rank: int, directory: Path, signal_at: int | None = None, on: int = 1) -> Any:
    """Train; a signal comes to one rank at one step. Return where it stopped, and the digest."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    parallel = Parallel(rank)
    with Loop(directory, POLICY, model=parallel.model, optimizer=parallel.optimizer) as loop:
        loop.resume()
        for _ in loop.epochs(4):
            for (batch,) in loop.batches(parallel.loader):
                loss = parallel.learn(batch)
                if loop.progress.step + 1 == signal_at and rank == on:
                    os.kill(os.getpid(), signal.SIGTERM)
                loop.step({"loss": loss})
    return loop.progress.step, loop.stopped, received, parallel.digest()


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_they_go_on_exactly(tmp_path: Path) -> None:
    """Also within an epoch: each rank's dropout and place in the data are its own, and come back."""
    unbroken = [digest for _, _, _, digest in together(2, train, tmp_path / "unbroken")]
    assert unbroken[0] != unbroken[1], "the ranks draw other numbers"
    for signal_at, on in ((3, 1), (10, 0)):
        stops = together(2, train, tmp_path / "run", signal_at, on)
        steps = {step for step, *_ in stops}
        assert 1 == len(steps), "all at one step"
        assert signal_at <= steps.pop() <= signal_at + 4
        assert [[signal.SIGTERM], [signal.SIGTERM]] == [received for _, _, received, _ in stops]
        assert all(stopped.startswith("SIGTERM at step") for _, stopped, _, _ in stops)
    assert unbroken == [digest for _, _, _, digest in together(2, train, tmp_path / "run")]


def fail(rank: int, directory: Path | None) -> Any:
    """Fail on rank 1 in step 6; with a directory in our loop. Return what each rank saw, and when."""
    parallel = Parallel(rank)
    since = 0.0

    def step(number: int, batch: torch.Tensor) -> None:
        nonlocal since
        since = time.monotonic()
        if number == 6 and rank == 1:
            raise ZeroDivisionError("mine")
        parallel.learn(batch)

    try:
        if directory is None:
            for number in range(STEPS):
                step(number, torch.ones(2, 4))
        else:
            with Loop(directory, POLICY, model=parallel.model, optimizer=parallel.optimizer) as loop:
                for _ in loop.epochs(1):
                    for number in loop.batches(range(STEPS)):
                        step(number, torch.ones(2, 4))
                        loop.step()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - since
    return "nothing", "", 0.0


def test_an_exception_on_one_rank_is_seen_as_itself_and_soon(tmp_path: Path) -> None:
    """Within 2 s of what it takes without us: the others may be waiting in a collective, and are not waited for."""
    without = together(2, fail, None)
    ours = together(2, fail, tmp_path)
    assert ("ZeroDivisionError", "mine") == without[1][:2] == ours[1][:2]
    assert ours[1][2] < without[1][2] + 2.0
    assert ["step=4"] == [f"step={record.step}" for record in CheckpointManager(tmp_path).records]


def look(rank: int, directory: Path) -> Any:
    """Resume on another number of ranks."""
    parallel = Parallel(rank)
    with Loop(directory, POLICY, model=parallel.model, optimizer=parallel.optimizer) as loop:
        with pytest.warns(CheckpointerWarning, match="saved by 2 processes, resumed by 3: each goes on after"):
            loop.resume()
        last = loop.last
        try:
            said = repr(loop.manager)
        except RanksError as error:
            said = str(error)
        return loop.progress.step, loop.progress.batch, last.step if last else None, said


def test_another_number_of_ranks_goes_on_and_says_that_it_is_not_exact(tmp_path: Path) -> None:
    """The weights come back; each rank's share of the epoch is another."""
    (step, *_), _ = together(2, train, tmp_path, 4)
    looks = together(3, look, tmp_path)
    assert {(step, (step % 6) * 2 // 3)} == {(at, batch) for at, batch, _, _ in looks}
    assert {step} == {last for _, _, last, _ in looks}
    assert "rank 1 has no manager, rank 0 has" in looks[1][3]


def request(rank: int, directory: Path) -> Any:
    """Ask for a save on rank 1, by a signal, and report a validation."""
    parallel = Parallel(rank)
    # A rule that does not keep the end of the training: a regular save retires the one that is asked for.
    with Loop(directory, Policy(EverySteps(1000), [KeepEvery(steps=1000)]), model=parallel.model) as loop:
        for _ in loop.epochs(1):
            for number in loop.batches(range(STEPS)):
                time.sleep(0.01)
                if number == 3 and rank == 1:
                    os.kill(os.getpid(), signal.SIGUSR2)
                loop.step()
                loop.report({"val": float(number)})
    return loop.progress.step, loop.last.name if loop.last else ""


def test_a_save_asked_of_one_rank_is_made_by_all(tmp_path: Path) -> None:
    """Taking the state is a matter of every rank; none is held up for good."""
    (step, name), other = together(2, request, tmp_path)
    assert (STEPS, name) == (step, name) == other
    assert name.startswith("rescue-step=")
    assert 2 == len(torch.load(tmp_path / name, weights_only=True)["loop"]["ranks"])
    assert "0.weight" in torch.load(tmp_path / name, weights_only=True)["model"]


def train_zero(rank: int, directory: Path, until: int) -> Any:
    """Train with an optimizer whose state is spread over the ranks; return the weights and where it began."""
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.01)
    with Loop(directory, Policy(EverySteps(1), [KeepLast(1)]), model=net, optimizer=optimizer) as loop:
        start = loop.resume().step
        for _ in loop.epochs(1):
            for number in loop.batches(range(6)):
                net(torch.full((2, 4), float(number))).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                loop.step()
                if loop.progress.step == until:
                    break
            break
    return start, [parameter.tolist() for parameter in net.parameters()]


def test_an_optimizer_in_shards_is_gathered_and_goes_on_exactly(tmp_path: Path) -> None:
    """Each rank's shard comes to rank 0 before a save."""
    unbroken = together(2, train_zero, tmp_path / "unbroken", 6)
    together(2, train_zero, tmp_path / "run", 3)
    again = together(2, train_zero, tmp_path / "run", 6)
    assert [3, 3] == [start for start, _ in again]
    assert [weights for _, weights in unbroken] == [weights for _, weights in again]


def stop_with_a_slow_mirror(rank: int, directory: Path) -> float:
    """Stop while the mirror takes no upload; return the seconds that it took."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    mirror = GatedStorage()
    mirror.shut()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the mirror .* is behind", CheckpointerWarning)
        with Loop(directory, POLICY, options={"mirror": mirror}, grace_s=1.0) as loop:
            for _ in loop.epochs(1):
                for _ in loop.batches(range(1000)):
                    if loop.progress.step == 5 and rank == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    if loop.progress.step == 5:
                        began = time.monotonic()
                    loop.step()
    assert loop.stopped, "before the data ended"
    return time.monotonic() - began


def test_no_rank_waits_for_the_mirror_beyond_the_grace(tmp_path: Path) -> None:
    """One that never answers holds rank 0 for the rest of the grace, and not for ten minutes."""
    for took_s in together(2, stop_with_a_slow_mirror, tmp_path):
        assert took_s < 60.0


def validate(rank: int, directory: Path) -> Any:
    """Validate twice, with more batches on one rank; the second time a signal comes to the other one."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    seen = [0, 0]
    with Loop(directory, POLICY) as loop:
        for epoch in loop.epochs(2):
            for _ in loop.batches(range(3)):
                loop.step()
            for number in loop.validation(range(400 if rank else 300)):
                seen[epoch] += 1
                time.sleep(0.002)
                if (rank, epoch, number) == (0, 1, 50):
                    os.kill(os.getpid(), signal.SIGTERM)
    return loop.progress.step, loop.stopped, seen


def test_ranks_with_other_numbers_of_batches_stop_within_a_validation(tmp_path: Path) -> None:
    """A rank that is done waits for the others: where they stop, all of them are there."""
    (first, _, short), (second, stopped, long) = together(2, validate, tmp_path)
    assert 6 == first == second
    assert stopped.startswith("SIGTERM at step 6; saved as rescue-step=6.ckpt")
    assert (300, 400) == (short[0], long[0])
    assert long[1] < 400, "cut short on the rank that got no signal"


def learn_with_workers(rank: int, directory: Path) -> Any:
    """Train with workers until the signal has come to the group of this rank and of its workers."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    os.setpgid(0, 0)
    parallel = Parallel(rank)
    loader = DataLoader(parallel.loader.dataset, 2, num_workers=2, multiprocessing_context="fork")
    with Loop(directory, POLICY, model=parallel.model, optimizer=parallel.optimizer) as loop:
        for _ in loop.epochs(10):
            for (batch,) in loop.batches(loader):
                parallel.learn(batch)
                if loop.progress.step == 5:
                    # Not from here: torch's workers treat a signal of their parent in another way.
                    subprocess.run(["kill", "-TERM", "--", f"-{os.getpid()}"], start_new_session=True, check=True)
                    time.sleep(0.1)
                loop.step()
    return loop.progress.step, loop.stopped, received


def test_workers_outlive_a_signal_to_the_group_until_the_ranks_have_agreed(tmp_path: Path) -> None:
    """That may take several steps, and each of them needs its batch."""
    (step, stopped, received), other = together(2, learn_with_workers, tmp_path)
    assert (step, stopped, received) == other
    assert [signal.SIGTERM] == received
    assert stopped.startswith(f"SIGTERM at step {step}; ")
