"""A state under other names, which a module's own hooks take: as torch loads it, and nothing is left out silently."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_torch import Loop, load_weights
from torch import nn
from torch.nn.utils import parametrizations

from checkpointer import CheckpointerWarning, EverySteps, KeepAll, Policy
from checkpointer.errors import MismatchError

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
POLICY = Policy(EverySteps(1), [KeepAll()])


def net(norm: Any, *, seed: int = 0, width: int = 4) -> nn.Sequential:
    """Return a model with weight normalisation, of the old kind or the new one."""
    torch.manual_seed(seed)
    return nn.Sequential(norm(nn.Linear(3, width)), nn.BatchNorm1d(width), norm(nn.Linear(width, 2, bias=False)))


def old(**kw: Any) -> nn.Sequential:
    """Return a model whose names are ``weight_g`` and ``weight_v``."""
    return net(nn.utils.weight_norm, **kw)


def new(**kw: Any) -> nn.Sequential:
    """Return the same model, whose names are ``parametrizations.weight.original0`` and ``original1``."""
    return net(parametrizations.weight_norm, **kw)


def answer(model: nn.Module) -> torch.Tensor:
    """Return what a model computes."""
    with torch.no_grad():
        return model.eval()(torch.arange(6.0).reshape(2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_load_weights_takes_the_old_names_of_a_weight_norm(tmp_path: Path, wrap: Any) -> None:
    """From a file, within a wrapper, and beside other states, as ``load_state_dict`` does."""
    model = old()
    path = tmp_path / "old.pt"
    torch.save({"model": model.state_dict(), "optimizer": torch.optim.Adam(model.parameters()).state_dict()}, path)
    target = new(seed=1)
    report = load_weights(wrap(target), path)
    assert answer(model).equal(answer(target))
    assert tuple(target.state_dict()) == report.loaded
    assert not report.differences


def test_a_loop_resumes_its_training_after_the_names_have_changed(tmp_path: Path) -> None:
    """Of the same Loop, and of another program's file; the optimizer's states go to the same parameters."""

    def trained(model: nn.Module, steps: int, resume: Any = True, **kw: Any) -> Loop:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        with Loop(tmp_path / "run", POLICY, model=model, optimizer=optimizer) as loop:
            if resume:
                loop.resume(**kw)
            for _ in loop.epochs(1):
                for batch in loop.batches(torch.arange(60.0).reshape(10, 2, 3)[:steps]):
                    optimizer.zero_grad()
                    model.train()(batch).sum().backward()
                    optimizer.step()
                    loop.step({})
        return loop

    whole = old()
    trained(whole, 4)
    torch.save({"m": whole.state_dict()}, tmp_path / "foreign.pt")
    resumed = new(seed=1)
    with Loop(tmp_path / "run", POLICY, model=resumed, optimizer=torch.optim.Adam(resumed.parameters())) as loop:
        loop.resume()
    assert answer(whole).equal(answer(resumed))
    other = new(seed=2)
    with Loop(tmp_path / "other", POLICY, model=other) as loop:
        loop.resume(tmp_path / "foreign.pt", map={"model": "m"})
    assert answer(whole).equal(answer(other))


def test_what_no_hook_takes_is_still_an_error_and_nothing_is_loaded() -> None:
    """The names that hooks take are not in the message; half of a pair is."""
    state = old().state_dict()
    state["more"] = torch.ones(1)
    target = new(seed=1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(MismatchError, match=r"does not fit, and nothing was loaded: unexpected: more\. Use"):
        load_weights(target, state)
    del state["more"], state["0.weight_g"]
    names = r"missing: 0\.parametrizations\.weight\.original0, .*original1; unexpected: 0\.weight_v\."
    with pytest.raises(MismatchError, match=names):
        load_weights(target, state)
    assert all(value.equal(before[key]) for key, value in target.state_dict().items())


def test_what_hooks_take_and_has_another_shape_is_named_and_left_out() -> None:
    """With ``strict=False`` the rest is loaded."""
    model, target = old(), new(seed=1, width=5)
    wide = target.state_dict()["0.parametrizations.weight.original1"].clone()
    with pytest.raises(
        MismatchError, match=r"0\.parametrizations\.weight\.original1 \(here \[5, 3\], there \[4, 3\]\)"
    ):
        load_weights(target, model.state_dict())
    with pytest.warns(CheckpointerWarning, match="original1"):
        report = load_weights(target, model.state_dict(), strict=False)
    assert wide.equal(target.state_dict()["0.parametrizations.weight.original1"])
    assert "2.parametrizations.weight.original0" in report.loaded
    assert "2.parametrizations.weight.original1" not in report.loaded
    assert target.state_dict()["2.parametrizations.weight.original0"].equal(model.state_dict()["2.weight_g"])


class Transposed(nn.Module):
    """A layer whose older version had its weight transposed, and counted nothing."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"].T
            state_dict[prefix + "count"] = torch.tensor(5)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_a_module_converts_a_state_of_its_older_version_once(tmp_path: Path) -> None:
    """Its version is in the metadata of the state."""
    saved: OrderedDict[str, Any] = OrderedDict(weight=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    saved._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    torch.save({"m": saved}, tmp_path / "old.pt")
    layer, other = Transposed(), Transposed()
    assert not load_weights(layer, tmp_path / "old.pt").differences
    with Loop(tmp_path / "run", POLICY, model=other) as loop:
        loop.resume(tmp_path / "old.pt", map={"model": "m"})
    for one in (layer, other):
        assert ([[1.0, 3.0], [2.0, 4.0]], 5) == (one.weight.tolist(), int(one.state_dict()["count"]))


def test_batch_norm_takes_a_state_without_its_counter_and_keeps_its_own(tmp_path: Path) -> None:
    """Torch counts the batches since 0.4.1."""
    saved = nn.BatchNorm1d(2).state_dict()
    del saved["num_batches_tracked"]
    saved._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    torch.save({"m": saved}, tmp_path / "old.pt")
    norm, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for one in (norm, other):
        one.state_dict()["num_batches_tracked"].fill_(7)
    load_weights(norm, tmp_path / "old.pt")
    with Loop(tmp_path / "run", POLICY, model=other) as loop:
        loop.resume(tmp_path / "old.pt", map={"model": "m"})
    assert norm.num_batches_tracked == other.num_batches_tracked == 7


def test_spectral_norm_takes_a_state_of_its_first_version() -> None:
    """It computes the vector that it has today from the weights that the state has."""
    model = nn.utils.spectral_norm(nn.Linear(3, 4))
    model(torch.ones(1, 3))
    saved = model.state_dict()
    saved["weight"] = model.weight.detach().clone()
    vector = saved.pop("weight_v")
    saved._metadata[""] = {"version": 1}  # type: ignore[attr-defined]
    target = nn.utils.spectral_norm(nn.Linear(3, 4))
    assert not load_weights(target, saved).differences
    assert torch.allclose(vector, target.weight_v, atol=1e-3)  # type: ignore[arg-type]
    assert target.weight_orig.equal(saved["weight_orig"])  # type: ignore[operator]


class Closed(nn.Module):
    """A module that cannot be copied, and renames."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.v = nn.Parameter(torch.zeros(2))
        self.source = (number for number in range(3))
        self._register_load_state_dict_pre_hook(lambda state, prefix, *_: state.update(w=state.pop("old")))  # type: ignore[no-untyped-call]


def test_a_module_that_cannot_be_copied_gets_the_plain_comparison() -> None:
    """The message has the names as they are."""
    with pytest.raises(MismatchError, match="missing: w; unexpected: old"):
        load_weights(Closed(), {"old": torch.ones(2), "v": torch.ones(2)})


class Doubling(nn.Module):
    """A module whose hook renames, and writes to the tensor in place."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Parameter(torch.zeros(2))
        self._register_load_state_dict_pre_hook(lambda state, *_: state.update(new=state.pop("old").mul_(2)))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("is_loop", [False, True])
def test_a_hook_that_writes_in_place_changes_a_value_once(tmp_path: Path, *, is_loop: bool) -> None:
    """The trial that says which names the hooks take works on copies."""
    torch.save({"m": {"old": torch.ones(2)}}, tmp_path / "old.pt")
    model = Doubling()
    if is_loop:
        with Loop(tmp_path / "run", POLICY, model=model) as loop:
            loop.resume(tmp_path / "old.pt", map={"model": "m"})
    else:
        load_weights(model, tmp_path / "old.pt")
    assert [2, 2] == model.new.tolist()


class Large(torch.Tensor):
    """A tensor that is too large for a second one."""

    def __deepcopy__(self, memo: Any) -> Any:
        pytest.fail("the tensor was copied with its memory")


def test_the_trial_of_the_hooks_copies_no_tensor_that_a_module_holds() -> None:
    """A table that is neither a parameter nor a buffer may be the largest part of a module."""
    model = new()
    model.table = torch.ones(4).as_subclass(Large)
    assert not load_weights(model, old().state_dict()).differences
