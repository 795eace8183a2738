"""Several processes (gloo) and one directory: rank 0 decides, each writes its own part, all know the same."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.servers.fixtures import Serve
from support.sharded import Training
from support.together import DiedError, together
from torch.distributed.checkpoint.state_dict_loader import load

from checkpointer import (
    AnyOf,
    CheckpointerWarning,
    CheckpointManager,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    KeepBest,
    KeepLast,
    Policy,
)
from checkpointer.distributed.manager import DistributedManager
from checkpointer.distributed.ranks import OneRank, TorchRanks
from checkpointer.errors import PolicyError, RestoreError

pytestmark = pytest.mark.slow

POLICY = Policy(EverySteps(3), [KeepLast(2)], last="link")
STEP_S = 0.005


@attrs.define
class Counting:
    """Counts how often the ranks communicate."""

    ranks: TorchRanks
    num_calls: int = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("broadcast", "gather", "highest", "barrier"):
            self.num_calls += 1
        return getattr(self.ranks, name)


def count(rank: int, directory: Path) -> Any:
    ranks: Any = Counting(TorchRanks())
    taken: list[int] = []

    def state() -> Any:
        taken.append(rank)
        return {"rank": rank}

    policy = Policy(AnyOf(EverySteps(10), EveryEpochs(1)), [KeepBest(1, "loss", mode="min"), KeepLast(1)], last="link")
    seen = []
    with DistributedManager(directory, policy, ranks=ranks, state=state) as manager:
        opened = ranks.num_calls
        for step in range(1, 31):
            before = ranks.num_calls
            # Ranks measure different things: rank 0's metrics count.
            decision = manager.observe(
                {"loss": 1 / step + rank * step}, step, (step - 1) // 15, epoch_end=step % 15 == 0
            )
            seen.append((bool(decision), ranks.num_calls > before))
        assert manager.best is not None
        assert manager.last is not None
        shown = manager.best.name, manager.last.name
    return opened, seen, len(taken), shown


def test_an_option_that_no_manager_has_is_refused_on_every_rank() -> None:
    """With the closest name that there is."""
    with pytest.raises(
        PolicyError, match="DistributedManager has no option 'tolerate_failure'; did you mean 'tolerate_fail"
    ):
        DistributedManager(None, ranks=OneRank(), state=dict, tolerate_failure=3)


def test_ranks_communicate_only_when_something_is_due_and_know_the_same(tmp_path: Path) -> None:
    """Step and epoch triggers are functions of their arguments: an observation that is not due costs no collective."""
    first, second = together(2, count, tmp_path / "run")

    assert first == second
    _, seen, taken, shown = first
    assert [10, 15, 20, 30] == [step + 1 for step, (saved, _) in enumerate(seen) if saved]
    assert all(saved == called for saved, called in seen)
    assert 4 == taken
    with CheckpointManager(tmp_path / "run") as manager:
        assert 30 == manager.records[-1].step
        restored = manager.restore()
        assert restored is not None
        assert {"rank": 0} == restored.state
        assert shown[1] == restored.record.name


def keep_time(rank: int, directory: Path) -> Any:
    ranks: Any = Counting(TorchRanks())
    saved = []
    with DistributedManager(directory, Policy(EverySeconds(0.3), [KeepLast(1)]), ranks=ranks, state=dict) as manager:
        opened = ranks.num_calls
        for step in range(1, 301):
            time.sleep(STEP_S)
            if manager.observe({}, step, 0, epoch_end=False):
                saved.append(step)
        return saved, ranks.num_calls - opened


def test_a_time_trigger_saves_at_the_same_step_everywhere_and_communicates_seldom(tmp_path: Path) -> None:
    """Rank 0's clock counts; the ranks agree every few steps, not at each."""
    (saved, calls), other = together(2, keep_time, tmp_path / "run")

    assert (saved, calls) == other
    assert saved
    assert calls < 300


def observe_all(rank: int, directory: Path) -> Any:
    if rank == 1:
        os.chdir("/")
    state = {"w": torch.arange(4.0)}
    with DistributedManager(directory, POLICY, state=lambda: state) as manager:
        for step in range(1, 7):
            manager.observe({}, step, 0, epoch_end=False)
    state = {"w": torch.zeros(4)}
    with DistributedManager(directory, POLICY, state=lambda: state) as manager:
        restored = manager.restore()
        assert restored is not None
        with pytest.raises(RestoreError, match="nothing"):
            manager.restore("nothing")
        return restored.step, restored.state["w"].tolist()


@pytest.mark.parametrize("place", ["shared", "rank 0's"])
def test_every_rank_gets_what_rank_0_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """From the disk where it sees the same one, and else from rank 0."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run" if place == "shared" else Path("run")

    assert [(6, [0.0, 1.0, 2.0, 3.0])] * 2 == together(2, observe_all, directory)


# Sharded state


def train(rank: int, directory: Path, steps: int) -> Any:
    training = Training(seed=rank + 7)
    with DistributedManager(directory, POLICY, state=training.state_dict, format="dcp") as manager:
        restored = manager.restore()
        if restored is not None:
            training.load(restored.state)
            assert ["plain", {"data": 1}] == restored.state["note"]
        started = training.step, training.whole()
        while training.step < steps:
            loss = training.learn()
            manager.observe({"loss": loss}, training.step, 0, epoch_end=False)
        return started, training.whole()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A directory that two ranks have trained in, and the weights at its end."""
    directory = tmp_path_factory.mktemp("sharded") / "run"
    first, second = together(2, train, directory, 6)
    assert first[1] == second[1]
    return directory, first[1]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_of_two_ranks_are_restored_on_another_number(trained: tuple[Path, Any], size: int) -> None:
    """Weights and optimizer; a restore reads into what the training has now."""
    directory, weights = trained
    results = together(size, train, directory, 6)

    assert [((6, weights), weights)] * size == results


def test_a_folder_of_shards_is_read_by_torch_and_by_one_process(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """Without this library, and from wherever the directory was moved to."""
    directory, weights = trained
    with CheckpointManager(directory, format="dcp") as manager:
        restored = manager.restore("epoch=0-step=6.dcp")
        assert restored is not None
        assert [p.flatten().tolist() for p in restored.state["model"].values()] == weights
        assert 6 == restored.state["step"]
        assert "dcp" == restored.record.format

    state = {"model": {"0.weight": torch.zeros(10, 6)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(state, checkpoint_id=directory / "epoch=0-step=6.dcp")
    assert weights[0] == state["model"]["0.weight"].flatten().tolist()
    assert str(directory).encode() not in (directory / "epoch=0-step=6.dcp" / ".metadata").read_bytes()


def train_at_url(rank: int, url: str, options: dict[str, Any], steps: int) -> Any:
    training = Training(seed=rank + 7)
    with DistributedManager(url, POLICY, state=training.state_dict, format="dcp", storage_options=options) as manager:
        restored = manager.restore()
        if restored is not None:
            training.load(restored.state)
        started = training.step
        while training.step < steps:
            training.learn()
            manager.observe({}, training.step, 0, epoch_end=False)
        return started, training.whole()


def test_shards_in_a_bucket(serve: Serve) -> None:
    """Each rank writes its own to S3, and another number of ranks reads them there."""
    server = serve("s3")
    url = f"{server.url}/shards"
    first, second = together(2, train_at_url, url, dict(server.storage_options), 6)
    assert first == second
    assert [(6, first[1])] == together(1, train_at_url, url, dict(server.storage_options), 6)


def damage_and_restore(rank: int, directory: Path) -> Any:
    training = Training(seed=3)
    with DistributedManager(directory, POLICY, state=training.state_dict, format="dcp") as manager:
        for step in (3, 6):
            while training.step < step:
                training.learn()
            manager.observe({}, step, 0, epoch_end=False)
        if rank == 0:
            shard = next((directory / "epoch=0-step=6.dcp").glob("*.distcp"))
            shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", CheckpointerWarning)
            restored = manager.restore()
        assert restored is not None
    other = {"model": {"other": torch.zeros(3)}}
    manager = DistributedManager(directory, POLICY, state=lambda: other, format="dcp")
    with pytest.raises(RestoreError) as caught:
        manager.restore(3)
    manager.close()
    return restored.step, int(restored.state["step"]), [str(w.message)[:60] for w in warned], str(caught.value)[:90]


def test_damaged_shards_are_found_and_the_older_checkpoint_is_restored_by_all(tmp_path: Path) -> None:
    """One flipped byte of one rank's file; and a state that is another one's is an error that names the difference."""
    first, second = together(2, damage_and_restore, tmp_path / "run")

    warned = ["restored epoch=0-step=3.dcp (step 3), because newer or bette"]
    differs = "the checkpoint does not fit the state: model.other is not in the checkpoint; model.0.bi"
    assert (3, 3, warned) == first[:3]
    assert (3, 3, []) == second[:3]
    assert first[3].startswith(differs)


def die_while_writing(rank: int, directory: Path) -> Any:
    training = Training(seed=3)

    def state() -> Any:
        if training.step > 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return training.state_dict()

    manager = DistributedManager(directory, POLICY, state=state, format="dcp")
    for step in range(1, 7):
        training.step = step
        manager.observe({}, step, 0, epoch_end=False)


def test_a_rank_killed_during_a_save_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    """The others get an error, and what was unfinished is swept by the next run."""
    alive, dead = together(2, die_while_writing, tmp_path / "run")

    assert isinstance(dead, DiedError)
    assert isinstance(alive, Exception)
    (_, weights), (_, other) = together(2, train, tmp_path / "run", 6)
    assert weights == other
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"epoch=0-step=3.dcp", "epoch=0-step=6.dcp", "last.dcp", ".checkpointer"} == names
    assert not [*(tmp_path / "run" / ".checkpointer").glob("staging/*/*")]


def fail(rank: int, directory: Path, failing: tuple[int, ...]) -> Any:
    training = Training(seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        with DistributedManager(directory, POLICY, state=training.state_dict, format="dcp") as manager:
            for step in range(1, 6):
                training.learn()
                manager.observe({}, step, 0, epoch_end=False)
                if step == 5 and rank in failing:
                    raise ValueError(f"rank {rank}")
            return "trained"


def test_an_error_on_all_ranks_is_rescued_and_one_on_a_single_rank_is_seen_as_itself(tmp_path: Path) -> None:
    """Saving shards needs all ranks, so a rank does not wait for one that will not come."""
    both = together(2, fail, tmp_path / "both", (0, 1))
    single = together(2, fail, tmp_path / "single", (1,))

    assert ["ValueError('rank 0')", "ValueError('rank 1')"] == [*map(repr, both)]
    assert ["'trained'", "ValueError('rank 1')"] == [*map(repr, single)]
    with CheckpointManager(tmp_path / "both") as manager:
        assert ["rescue", 5] == [manager.records[-1].kind, manager.records[-1].step]
    with CheckpointManager(tmp_path / "single") as manager:
        assert [3] == [record.step for record in manager.records]


def fail_to_take(rank: int, directory: Path) -> Any:
    broken = [True]

    def state() -> Any:
        if rank == 1 and broken:
            raise ValueError("no state")
        return {"w": torch.ones(1)}

    with DistributedManager(directory, POLICY, state=state, format="dcp") as manager:
        with pytest.raises(Exception, match="no state"):
            manager.observe({}, 3, 0, epoch_end=False)
        broken.clear()
        return bool(manager.observe({}, 6, 0, epoch_end=False))


def test_a_state_that_one_rank_cannot_take_is_an_error_on_all(tmp_path: Path) -> None:
    """Nothing was written, and the next save works."""
    assert [True, True] == together(2, fail_to_take, tmp_path / "run")
    with CheckpointManager(tmp_path / "run") as manager:
        assert [6] == [record.step for record in manager.records]
