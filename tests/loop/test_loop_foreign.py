"""Another program's file with objects beside the state: what the map names is read, and no code of the file runs."""

from __future__ import annotations

import argparse
import enum
import shutil
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from checkpointer_torch import Loop
from support.commands import command
from torch import nn

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.errors import MismatchError, RestoreError, UnsafePayloadError
from checkpointer.formats.inspection.rebuild import unread_in
from checkpointer.formats.inspection.torch_file import open_torch

EVERY: Final = Policy(EverySteps(1), [KeepLast(1)])
FOREIGN: Final = Path(__file__).parents[1] / "foreign/files"


class Kind(enum.Enum):
    BIG = 1


class Planted:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (open, (str(self.trace), "w"))


def make() -> tuple[nn.Linear, torch.optim.Adam]:
    """Return a model and its optimizer, which has a state."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(path: Path, **more: Any) -> tuple[nn.Linear, torch.optim.Adam]:
    """Save what a training of one's own has, with objects beside it."""
    model, optimizer = make()
    args = argparse.Namespace(lr=0.5, out=path.parent)
    beside = {"args": args, "kind": Kind.BIG, "planted": Planted(path.parent / "trace")}
    state = {"net": model.state_dict(), "opt": optimizer.state_dict(), "epoch": 3, **beside, **more}
    torch.save(state, path)
    return model, optimizer


def test_objects_beside_the_state_do_not_hinder_a_resume(tmp_path: Path) -> None:
    """A Namespace, an Enum, a Path and a planted object stay unread, and the training goes on with the rest."""
    path = tmp_path / "old.pt"
    old, old_optimizer = save(path)
    model, optimizer = make()
    names: dict[str, Any] = {"model": "net", "optimizer": "opt", "epoch": "epoch", "step": lambda old: old["epoch"] * 5}
    with Loop(tmp_path / "run", EVERY, model=model, optimizer=optimizer) as loop:
        progress = loop.resume(path, map=names)
    assert (3, 15) == (progress.epoch, progress.step)
    assert torch.equal(old.weight, model.weight)
    expected = old_optimizer.state_dict()["state"][0]
    assert all(torch.equal(value, optimizer.state_dict()["state"][0][key]) for key, value in expected.items())
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"epoch": "kind"}, r"old.pt was read without .*'epoch' needs 'kind', and it is made by .*Kind\. In map="),
        ({"model": lambda old: {"w": [old["args"]]}}, r"and 'w.0' in it is made by argparse.Namespace"),
        ({"model": lambda old: {old["kind"]: 1}}, r"and '\(a key\)' in it is made by .*Kind"),
    ],
)
def test_an_object_that_the_map_needs_is_refused(tmp_path: Path, names: dict[str, Any], match: str) -> None:
    """By the name in the map, the place and the class; nothing is loaded."""
    save(tmp_path / "old.pt")
    model, _ = make()
    before = model.weight.clone()
    with (
        Loop(tmp_path / "run", EVERY, model=model) as loop,
        pytest.raises(UnsafePayloadError, match=match),
    ):
        loop.resume(tmp_path / "old.pt", map={"model": "net", **names})
    assert torch.equal(before, model.weight)
    assert not (tmp_path / "trace").exists()


def test_a_function_of_the_map_that_looks_into_an_object_gets_an_error_with_the_reason(tmp_path: Path) -> None:
    """The object has no attributes, and says what to do."""
    save(tmp_path / "old.pt")
    with (
        Loop(tmp_path / "run", EVERY, model=make()[0]) as loop,
        pytest.raises(
            AttributeError, match=r"argparse.Namespace was not unpickled, so it has no 'lr'; .*weights_only="
        ),
    ):
        loop.resume(tmp_path / "old.pt", map={"model": "net", "step": lambda old: old["args"].lr})


def test_a_damaged_file_is_still_refused(tmp_path: Path) -> None:
    """With what the first reader said of it."""
    save(tmp_path / "old.pt")
    (tmp_path / "old.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:1000])
    with Loop(tmp_path / "run", EVERY, model=make()[0]) as loop, pytest.raises(RestoreError, match="torch file"):
        loop.resume(tmp_path / "old.pt", map={"model": "net"})


def test_a_whole_module_beside_objects_gives_its_state(tmp_path: Path) -> None:
    """Programs that pickle their model can be left without running it."""
    old, _ = make()
    save(tmp_path / "old.pt", whole=nn.Sequential(old, nn.BatchNorm1d(1)))
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    with Loop(tmp_path / "run", EVERY, model=model) as loop:
        loop.resume(tmp_path / "old.pt", map={"model": "whole"})
    assert torch.equal(old.weight, model.state_dict()["0.weight"])


def test_a_compiled_part_of_a_model_has_the_names_of_the_model(tmp_path: Path) -> None:
    """The file has `_orig_mod` in the middle of its names, and the model of today is not compiled."""
    old, new = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    parts: Any = [torch.compile(old[0]), old[1]]
    torch.save({"net": nn.Sequential(*parts).state_dict()}, tmp_path / "old.pt")
    with Loop(tmp_path / "run", EVERY, model=new) as loop:
        loop.resume(tmp_path / "old.pt", map={"model": "net"})
    assert all(map(torch.equal, old.state_dict().values(), new.state_dict().values()))


def test_a_managed_directory_of_another_program_is_read_too(tmp_path: Path) -> None:
    """Its newest checkpoint is verified, and its objects stay unread."""
    old, _ = make()
    state = {"net": old.state_dict(), "args": argparse.Namespace(lr=1)}
    with CheckpointManager(tmp_path / "old", EVERY, save=lambda path: torch.save(state, path)) as manager:
        manager.observe({}, step=1, epoch=0)
    model, _ = make()
    with Loop(tmp_path / "run", EVERY, model=model) as loop:
        loop.resume(tmp_path / "old", map={"model": "net"})
    assert torch.equal(old.weight, model.weight)


def test_a_file_that_timm_wrote_starts_a_loop(tmp_path: Path) -> None:
    """Model, average and epoch; its ``args`` are a Namespace."""
    nets = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)) for _ in range(2)]
    names = {"model": "state_dict", "ema": "state_dict_ema", "epoch": "epoch"}
    with Loop(tmp_path / "run", EVERY, model=nets[0], ema=nets[1]) as loop:
        loop.resume(FOREIGN / "timm/last.pth.tar", map=names)
    assert not torch.equal(nets[0].state_dict()["0.weight"], nets[1].state_dict()["0.weight"])


def test_a_loop_goes_on_in_the_directory_of_the_file(tmp_path: Path) -> None:
    """Adopted or not; of two sets of weights the map says which, and the error without a map says so."""
    folder = tmp_path / "timm"
    shutil.copytree(FOREIGN / "timm", folder)
    file = folder / "checkpoint-3.pth.tar"
    for is_adopted in (False, True):
        net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        if is_adopted:
            assert 0 == command("adopt", folder, "--steps-per-epoch", "100").code
            with (
                Loop(folder, EVERY, model=net) as loop,
                pytest.raises(MismatchError, match=r"In a Loop .* resume\('.*recovery-4-7.*map=\{'model': KEY\}"),
            ):
                loop.resume()
        with Loop(folder, EVERY, model=net) as loop:
            progress = loop.resume(file, map={"model": "state_dict", "epoch": "epoch"})
        assert 3 == progress.epoch
        expected = torch.load(file, weights_only=False)["state_dict"]
        assert torch.equal(expected["0.weight"], net.state_dict()["0.weight"])


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("is_legacy", [False, True])
def test_what_is_read_without_unpickling_is_what_torch_loads(tmp_path: Path, is_legacy: bool, protocol: int) -> None:
    """Containers keep their types, one tensor under two names is one again, and a list may hold itself."""
    weight = nn.Parameter(torch.randn(3, 2))
    state: dict[str, Any] = {
        "tied": [weight, weight, torch.arange(6).view(2, 3).t()],
        "sets": ({1, "a", (2, 3)}, frozenset({4}), torch.Size([1, 2])),
        "plain": (None, True, 2**70, 1.5, "text", b"bytes", 1 + 2j, torch.float16, torch.device("cpu")),
        "maps": (OrderedDict(b=1, a=2), Counter("aab"), {(1, 2): 3, 4: {}}),
        "net": nn.BatchNorm1d(2).state_dict(),
    }
    state["itself"] = [state["maps"]]
    state["itself"].append(state["itself"])
    path = tmp_path / "a.pt"
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not is_legacy)
    torch.save({**state, "foreign": defaultdict(list, a=[1])}, tmp_path / "b.pt", pickle_protocol=protocol)
    with path.open("rb") as stream:
        found = open_torch(stream).state()
    expected = torch.load(path, weights_only=False)
    assert found["tied"][0] is found["tied"][1]
    assert all(torch.equal(one, two) for one, two in zip(expected["tied"], found["tied"], strict=True))
    for name in ("sets", "plain", "maps"):
        assert expected[name] == found[name]
        assert [*map(type, expected[name])] == [*map(type, found[name])]
    assert found["itself"][0] is found["maps"]
    assert found["itself"][1] is found["itself"]
    assert expected["net"]._metadata == found["net"]._metadata
    assert [] == [*unread_in(found)]
    with (tmp_path / "b.pt").open("rb") as stream:
        assert {"a": [1]} == open_torch(stream).state()["foreign"]
