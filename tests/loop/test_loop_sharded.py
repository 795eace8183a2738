"""A loop whose state is spread over processes: exact on as many ranks, and moved exactly to another number of them."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from checkpointer_torch import Loop, load_weights
from checkpointer_torch.tensor_layouts import Layout, room_for
from support.layouts import BATCH, SAMPLES, Net, Numbered, SpreadTraining
from support.together import together
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import checkpointer
from checkpointer import AtSteps, CheckpointerWarning, DistributedManager, EverySteps, KeepLast, Policy
from checkpointer.errors import CheckpointerError, MismatchError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is")]

POLICY = Policy(AtSteps(4), [KeepLast(1)])
EPOCHS = 2
LIMIT = 6
"""Batches of an epoch, for layouts whose ranks do not share the data."""
LAYOUTS = ("fsdp", "hsdp", "tp", "fsdp+tp", "mixed")


def train(training: SpreadTraining, directory: Path, until: int = 0, **options: Any) -> tuple[Any, list[int]]:
    """Train, and leave after a step; return the start, and the numbers of the samples of the first epoch."""
    seen: list[int] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "saved by . processes, resumed by")
        policy = attrs.evolve(POLICY, contents=options.pop("contents", "full"))
        warnings.filterwarnings("ignore", "contents='weights'")
        with Loop(directory, policy, options=options, **training.objects) as loop:
            start = loop.resume()
            for epoch in loop.epochs(EPOCHS):
                for batch in loop.batches(training.loader, limit=LIMIT):
                    training.learn(batch)
                    seen += [int(number) for number in batch[:, 0]] if epoch == 0 else []
                    loop.step()
                    if loop.progress.step == until:
                        return start, seen
    return start, seen


def leave(training: SpreadTraining, directory: Path, until: int = 4, **options: Any) -> Any:
    """Train, and leave within the epoch; return all tensors whole, and the numbers of the samples used here."""
    _, seen = train(training, directory, until, **options)
    return training.whole(), seen


def take_over(training: SpreadTraining, directory: Path, until: int = 0) -> Any:
    """Go on with the epoch of another number of ranks; return the tensors as they came, and the samples used here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "saved by . processes, resumed by")
        with Loop(directory, POLICY, **training.objects) as loop:
            loop.resume()
            return training.whole(), train_on(loop, training, until)


def train_on(loop: Loop, training: SpreadTraining, until: int) -> list[int]:
    """Train to the end of the first epoch, or to a step."""
    seen: list[int] = []
    for _ in loop.epochs(1):
        for batch in loop.batches(training.loader, limit=LIMIT * 2):
            training.learn(batch)
            seen += [int(number) for number in batch[:, 0]]
            loop.step()
            if loop.progress.step == until:
                return seen
    return seen


def go_on_exactly(rank: int, folder: Path) -> dict[str, Any]:
    """Leave each training within an epoch, and go on in a new one; return both ends."""
    ends = {}
    for layout in LAYOUTS:
        for background in (None, "wait") if layout == "fsdp" else (None,):
            name = f"{layout}, {background}"
            unbroken = SpreadTraining(layout, 0)
            train(unbroken, folder / name / "unbroken", background=background)
            train(SpreadTraining(layout, 0), folder / name / "run", 4, background=background)
            again = SpreadTraining(layout, 7)
            (start, _) = train(again, folder / name / "run", background=background)
            ends[name] = start.step, start.batch, unbroken.digest(), again.digest()
    return ends


class Stream(IterableDataset[torch.Tensor]):
    """Counts its samples, and has its place as a state."""

    def __init__(self) -> None:
        self.number = 0

    def __iter__(self) -> Any:
        while self.number < SAMPLES:
            self.number += 1
            yield torch.full((4,), float(self.number))

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def stateful_loader() -> Any:
    """Return the class of torchdata."""
    return pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata").StatefulDataLoader


def streaming() -> SpreadTraining:
    """Return a training whose data is a stream."""
    training = SpreadTraining("fsdp", 0)
    training.loader = stateful_loader()(Stream(), batch_size=BATCH)
    return training


def fill_four(rank: int, folder: Path) -> Any:
    """Bit-exactness on four ranks, and what two ranks take over."""
    ends, left = go_on_exactly(rank, folder), {}
    for layout in LAYOUTS:
        left[layout] = leave(SpreadTraining(layout, 0), folder / "four" / layout)
    left["chain"] = leave(SpreadTraining("fsdp", 0), folder / "four" / "chain")
    left["stateful"] = leave(SpreadTraining("fsdp", 0, stateful_loader()), folder / "four" / "stateful")
    left["weights"] = leave(SpreadTraining("fsdp+tp", 0), folder / "weights", contents="weights")
    for hidden in ("same", "other"):
        value = torch.tensor(float(rank) if hidden == "other" else 5.0)
        with Loop(folder / hidden, POLICY, model=SpreadTraining("fsdp", 0).net, hidden=lambda: value) as loop:  # noqa: B023
            loop.step()
    leave(streaming(), folder / "stream")
    return ends, left


def take_two(rank: int, folder: Path) -> Any:
    """Take over on two ranks what four have left, and leave something for four and for one."""
    taken = {layout: take_over(SpreadTraining(layout, 7), folder / "four" / layout) for layout in LAYOUTS}
    taken["stateful"] = take_over(SpreadTraining("fsdp", 7, stateful_loader()), folder / "four" / "stateful")
    for until in (5, 6):
        taken[f"chain {until}"] = take_over(SpreadTraining("fsdp", 7), folder / "four" / "chain", until)
    taken["one file"] = take_over(SpreadTraining("fsdp", 7), folder / "one")
    left = {name: leave(SpreadTraining("fsdp", 3), folder / "two" / name, 3) for name in ("for four", "for one")}
    said = {}
    for name in ("same", "other"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "saved by . processes, resumed by")
            loop = Loop(folder / name, POLICY, model=SpreadTraining("fsdp", 0).net, hidden=lambda: torch.zeros(()))
            try:
                loop.resume()
                said[name] = str(loop["hidden"])
            except MismatchError as error:
                said[name] = str(error)
    with pytest.raises(MismatchError) as caught:
        take_over(streaming(), folder / "stream")
    said["stream"] = str(caught.value)
    layout = Layout((2, 2), (Shard(0), Replicate()))
    meshes = [init_device_mesh("cpu", (2,))]
    with pytest.raises(MismatchError) as caught:
        room_for("optimizer.rows", None, meshes, saved=layout, shape=(4,), dtype=torch.float32)
    said["mesh"] = str(caught.value)
    return taken, left, said


def take_four(rank: int, folder: Path) -> Any:
    """Take over on four ranks what two have left."""
    weights = SpreadTraining("fsdp", 9)
    load_weights(weights.net, folder / "weights")
    return {
        "for four": take_over(SpreadTraining("fsdp", 7), folder / "two" / "for four"),
        "chain": take_over(SpreadTraining("fsdp", 7), folder / "four" / "chain"),
        "weights": (weights.whole(), []),
    }


@pytest.fixture(scope="module")
def went(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run all processes, once: four, then two, then four again; return what each rank saw."""
    stateful_loader()
    folder = tmp_path_factory.mktemp("run")
    one = plain()
    with Loop(folder / "one", POLICY, **objects_of(*one)) as loop:
        loop.step()
    runs = []
    for size, run in ((4, fill_four), (2, take_two), (4, take_four)):
        runs.append(together(size, run, folder))
        assert not any(isinstance(result, BaseException) for result in runs[-1]), runs[-1]
    return folder, *runs


def plain() -> tuple[Net, torch.optim.Optimizer]:
    """Return a net and an optimizer that took a step, in this process alone."""
    torch.manual_seed(11)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    net(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    return net, optimizer


def tensors_of(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """Return the weights and the optimizer's tensors, as `SpreadTraining.whole` does."""
    found = {name: value.flatten().tolist() for name, value in net.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{key}": value.flatten().tolist() for key, value in values.items()}
    return found


def objects_of(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what a Loop of one process is given."""
    return {
        "model": net,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5),
    }


def test_each_layout_goes_on_bit_exactly_on_as_many_ranks(went: Any) -> None:
    """Weights, optimizer, schedule, each rank's random numbers and its place in the data."""
    folder, fours, *_ = went
    for ends, _ in fours:
        for name, (step, batch, unbroken, again) in ends.items():
            assert (4, 4) == (step, batch), name
            assert unbroken == again, name
    assert 6 == len(list(folder.glob("*/run/*.dcp")))
    assert [] == list(folder.glob("*/run/*.ckpt"))


def test_weights_and_optimizer_are_the_same_on_two_ranks(went: Any) -> None:
    """Four ranks have saved them, in each layout."""
    _, fours, twos, _ = went
    for name in (*LAYOUTS, "stateful"):
        whole = fours[0][1][name][0]
        for taken, *_ in twos:
            assert whole == taken[name][0], name


def test_the_data_goes_on_after_the_samples_that_were_used(went: Any) -> None:
    """Each sample once in the epoch, though the ranks are fewer, and the loader is torch's or torchdata's."""
    _, fours, twos, _ = went
    for name in ("fsdp", "hsdp", "mixed", "stateful"):
        before = [number for _, left in fours for number in left[name][1]]
        after = [number for taken, *_ in twos for number in taken[name][1]]
        assert (32, 16) == (len(before), len(after)), name
        assert list(range(SAMPLES)) == sorted(before + after), name
    for name in ("tp", "fsdp+tp"):
        # The ranks of one tensor read the same samples, and as many parts of the data are there as before.
        parts = {tuple(left[name][1]) for _, left in fours}
        rest = {tuple(taken[name][1]) for taken, *_ in twos}
        assert (len(parts), 1 if name == "tp" else 2) == (len(rest), len(parts)), name
        used = [number for part in (*parts, *rest) for number in part]
        assert len(used) == len(set(used)), name


def test_two_ranks_grow_to_four_within_a_batch(went: Any) -> None:
    """They have used 12 of 48 samples: three batches of each of two ranks are one and a half of each of four."""
    _, _, twos, fours = went
    whole = twos[0][1]["for four"][0]
    assert all(whole == taken["for four"][0] for taken in fours)
    before = [number for _, left, _ in twos for number in left["for four"][1]]
    after = [taken["for four"][1] for taken in fours]
    assert [9] * 4 == list(map(len, after))
    assert list(range(SAMPLES)) == sorted([*before, *(number for part in after for number in part)])


def test_an_epoch_is_shared_out_again_and_again(went: Any) -> None:
    """Four ranks, then two, two again, and four: each sample is used once."""
    _, first, twos, last = went
    parts = [left["chain"][1] for _, left in first]
    parts += [taken[f"chain {until}"][1] for taken, *_ in twos for until in (5, 6)]
    parts += [taken["chain"][1] for taken in last]
    assert list(range(SAMPLES)) == sorted(number for part in parts for number in part)


def test_one_process_takes_over_from_two_as_a_plain_model(went: Any) -> None:
    """Its module and optimizer know nothing of shards."""
    folder, _, twos, _ = went
    (whole, _), _ = (left["for one"] for _, left, _ in twos)
    loader = DataLoader(Numbered(), BATCH, sampler=DistributedSampler(Numbered(), 1, 0, seed=1))
    seen = [number for _, left, _ in twos for number in left["for one"][1]]
    (path,) = (folder / "two" / "for one").glob("*.dcp")
    for directory, source in ((path.parent, None), (path.parent, path), (folder / "moved", path)):
        net, optimizer = plain()
        with Loop(directory, POLICY, **objects_of(net, optimizer)) as loop:
            with pytest.warns(CheckpointerWarning, match="saved by 2 processes, resumed by 1"):
                loop.resume(source)
            assert whole == tensors_of(net, optimizer)
            for _ in loop.epochs(1) if directory != path.parent else ():
                for batch in loop.batches(loader):
                    seen += batch[:, 0].int().tolist()
                    loop.step()
    assert list(range(SAMPLES)) == sorted(seen)
    load_weights(net, path)
    assert whole["up.weight"] == net.up.weight.flatten().tolist()


def test_a_file_of_one_process_is_spread_over_two(went: Any) -> None:
    """A training that has outgrown one device."""
    net, _ = plain()
    for taken, *_ in went[2]:
        assert net.up.weight.flatten().tolist() == taken["one file"][0]["up.weight"]
        assert 1.0 == taken["one file"][0]["0.step"][0]


def test_weights_alone_are_saved_by_all_ranks_and_loaded_in_another_layout(went: Any) -> None:
    """By ``contents="weights"``, and `load_weights` into shards and into a plain module."""
    folder, fours, _, last = went
    whole = fours[0][1]["weights"][0]
    net = Net()
    load_weights(net, folder / "weights")
    for name, value in net.state_dict().items():
        assert whole[name] == value.flatten().tolist(), name
        assert all(whole[name] == taken["weights"][0][name] for taken in last), name


def test_what_cannot_move_is_named(went: Any) -> None:
    """Values that differed between ranks, a stream, and a tensor whose layout has no counterpart."""
    for _, _, said in went[2]:
        assert "tensor(5.)" == said["same"]
        assert "hidden differed between the 4 processes, so 2 cannot share it out, and nothing was" in said["other"]
        assert "the place in StatefulDataLoader is that of one of 4 processes, and 2 go on" in said["stream"]
        assert "optimizer.rows cannot be moved: it was saved on a mesh of 2x2 processes" in said["mesh"]


def disagree(rank: int, folder: Path) -> list[tuple[str, float]]:
    """Begin trainings of which rank 1 has another version, policy, model or format; return what each rank saw."""
    said = []

    def attempt(begin: Any) -> None:
        since = time.monotonic()
        try:
            begin()
        except CheckpointerError as error:
            said.append((f"{type(error).__name__}: {error}", time.monotonic() - since))

    def manage(**options: Any) -> None:
        DistributedManager(folder / "x", **{"policy": POLICY, "state": dict, **options}).close()

    model = nn.Linear(2, 2 + rank)
    attempt(lambda: manage(policy=POLICY if rank == 0 else Policy(EverySteps(3), [KeepLast(1)])))
    attempt(lambda: manage(format="torch" if rank == 0 else "dcp"))
    attempt(lambda: Loop(folder / "x", POLICY, model=model))
    objects: dict[str, Any] = {"model": model} if rank else {}
    attempt(lambda: Loop(folder / "x", POLICY, **objects))
    attempt(lambda: Loop(folder / "x", POLICY, thing=object() if rank else 1))
    before, checkpointer.__version__ = checkpointer.__version__, f"0.{rank}"
    attempt(manage)
    checkpointer.__version__ = before
    manage(policy=POLICY if rank == 0 else None)
    return said


def test_a_rank_with_another_program_is_an_error_on_all_ranks_at_once(tmp_path: Path) -> None:
    """Another policy, format, model, set of objects, or version of this library."""
    for rank, said in enumerate(together(2, disagree, tmp_path)):
        assert not isinstance(said, BaseException), said
        texts = [
            "RanksError: rank 1 differs from rank 0: policy is Policy(when=EverySteps(n=3, after=0)",
            "RanksError: rank 1 differs from rank 0: format is dcp there, and torch on rank 0",
            "RanksError: rank 1 differs from rank 0: model.weight is [3, 2] torch.float32 there, and [2, 2] torch",
            "RanksError: rank 1 differs from rank 0: objects is model there, and  on rank 0",
            "PolicyError: thing is a object" if rank else "RanksError: rank 1 failed: PolicyError('thing is a object",
            "RanksError: rank 1 differs from rank 0: version of checkpointer is 0.1 there, and 0.0 on rank 0",
        ]
        assert len(texts) == len(said)
        for text, (found, took_s) in zip(texts, said, strict=True):
            assert found.startswith(text)
            assert took_s < 60.0  # Without the check a rank waits for the other one until gloo gives up, 120 s.
