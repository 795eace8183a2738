"""Weights to start from, out of any checkpoint; and what is said where there are none."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_torch import Loop, load_weights
from torch import nn
from torch.optim.swa_utils import AveragedModel

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, HMACKey, KeepAll, KeepBest, Policy
from checkpointer.errors import CorruptError, MismatchError, NotFoundError, UntrustedError

safetensors = pytest.importorskip("safetensors.torch", reason="needs torch-checkpointer[safetensors]")
POLICY = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepAll()], last="link", best="link", name="{step}")


def net(value: float) -> nn.Sequential:
    """Return a model all of whose weights are this number."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def value_of(model: nn.Module) -> float:
    """Return the number that all weights are."""
    (value,) = {number for parameter in model.parameters() for number in parameter.detach().flatten().tolist()}
    return float(value)


def loaded(source: Any, *args: Any, **options: Any) -> float:
    """Return what a new model has got."""
    model = net(-1.0)
    load_weights(model, source, *args, **options)
    return value_of(model)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A directory with three checkpoints, the second of which is the best; each has an average beside the model."""
    model = net(0.0)
    with Loop(tmp_path / "ours", POLICY, ema=AveragedModel(net(9.0)), model=model) as loop:
        for _ in loop.epochs(1):
            for number in loop.batches([1.0, 2.0, 3.0]):
                model.load_state_dict(net(number).state_dict())
                loop.step({"loss": abs(number - 2.0)})
    return tmp_path / "ours"


def test_any_checkpoint_of_ours_can_be_named_in_any_way(ours: Path) -> None:
    """By directory, name, step, file and alias, as path or URL; of two modules that fit, by its part."""
    model = {"part": "model"}
    assert 3.0 == loaded(ours, **model) == loaded(str(ours), **model)
    assert (
        3.0 == loaded(f"file://{ours}", **model) == loaded(ours, "last", **model) == loaded(ours / "last.ckpt", **model)
    )
    assert 1.0 == loaded(ours, "step=1.ckpt", **model) == loaded(ours, 1, **model)
    assert 1.0 == loaded(ours / "step=1.ckpt", **model)
    assert 2.0 == loaded(ours, "best", policy=POLICY, **model) == loaded(ours / "best.ckpt", **model)
    assert 9.0 == loaded(ours, part="ema") == loaded(ours, part="ema.module")
    assert 9.0 == loaded(ours, part="ema", key_map={"module.": "", "n_averaged": None})


def test_a_checkpoint_of_ours_is_verified(ours: Path) -> None:
    """By file too: its record is beside it. The error for a missing file says that it is missing."""
    path = ours / "step=1.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"step=1.ckpt has other bytes"):
        loaded(path)
    path.unlink()
    gone = r"step=1.ckpt is gone, though its record is there"
    for place in ([path], [ours, "step=1.ckpt"]):
        with pytest.warns(CheckpointerWarning, match="does not count"), pytest.raises(CorruptError, match=gone):
            loaded(*place)


def test_a_signed_directory_needs_its_key(tmp_path: Path) -> None:
    """As for any restore."""
    key = HMACKey(b"k" * 32)
    with Loop(tmp_path, POLICY, options={"trust": key}, model=net(5.0)) as loop:
        for _ in loop.epochs(1):
            for _ in loop.batches([0]):
                loop.step({"loss": 0.0})
    assert 5.0 == loaded(tmp_path, trust=key)
    with pytest.raises(UntrustedError, match="key"):
        loaded(tmp_path, trust=HMACKey(b"x" * 32), which="step=1.ckpt")


def test_a_bare_file_is_read_whatever_it_calls_its_weights(tmp_path: Path) -> None:
    """`torch.save` of a state, of a larger one, or of a whole module, of which nothing is unpickled."""
    state = net(4.0).state_dict()
    for number, content in enumerate([state, {"model_state_dict": state, "epoch": 3}, {"net": state, "step": 1}]):
        torch.save(content, tmp_path / f"{number}.pt")
        assert 4.0 == loaded(tmp_path / f"{number}.pt")
    torch.save({"module." + key: value for key, value in state.items()}, tmp_path / "ddp.pt")
    assert 4.0 == loaded(tmp_path / "ddp.pt")
    torch.save(net(4.0), tmp_path / "module.pt")
    assert 4.0 == loaded(tmp_path / "module.pt")
    with pytest.raises(MismatchError, match="holds no weights"):
        loaded({"step": 1})
    with pytest.raises(MismatchError, match=r"no tensor under 'nett'; the payload has net \(7 tensors\)"):
        loaded(tmp_path / "2.pt", part="nett")


def test_safetensors_and_hugging_face_directories_are_read(tmp_path: Path) -> None:
    """In one file or in shards, in either format; as huggingface_hub and transformers lay them out."""
    state = {key: value.contiguous() for key, value in net(6.0).state_dict().items()}
    safetensors.save_file(state, tmp_path / "any.safetensors")
    assert 6.0 == loaded(tmp_path / "any.safetensors")
    halves = list(state)[::2], list(state)[1::2]
    for kind, save in (("safetensors", safetensors.save_file), ("bin", torch.save)):
        stem = "model" if kind == "safetensors" else "pytorch_model"
        whole, shards = tmp_path / f"whole-{kind}", tmp_path / f"shards-{kind}"
        whole.mkdir()
        shards.mkdir()
        (whole / "config.json").write_text("{}")
        save(state, whole / f"{stem}.{kind}")
        assert 6.0 == loaded(whole)
        names: dict[str, str] = {}
        for number, keys in enumerate(halves):
            name = f"{stem}-0000{number + 1}-of-00002.{kind}"
            save({key: state[key] for key in keys}, shards / name)
            names |= dict.fromkeys(keys, name)
        index = shards / f"{stem}.{kind}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        assert 6.0 == loaded(shards)
        (shards / name).unlink()
        with pytest.raises(NotFoundError, match=f"{name}, which is not there; beside it: {stem}-00001"):
            loaded(shards)
        index.write_text(json.dumps({"weight_map": {"a": "../other.bin"}}))
        with pytest.raises(CorruptError, match=r"names the shard '\.\./other.bin', which is not in its directory"):
            loaded(shards)


def test_a_directory_of_runs_says_which_runs_it_has(ours: Path) -> None:
    """To load its weights as to start from it; a path that is not there names few of many files."""
    with pytest.raises(NotFoundError, match=rf"no checkpoint of its own.* have: {ours.name}.*name one of them"):
        loaded(ours.parent)
    for number in range(9):
        torch.save({}, ours.parent / f"{number}.pt")
    with pytest.raises(NotFoundError, match=r"is not there; beside it: 0.pt, 1.pt, 2.pt, 3.pt, 4.pt and \d+ more"):
        loaded(ours.parent / "nothing.pt")


def test_a_directory_without_weights_says_what_it_has(tmp_path: Path) -> None:
    """A configuration alone, or a wrong path."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    with pytest.raises(NotFoundError, match=r"hf has no weights: .*model.safetensors.* it has config.json"):
        loaded(tmp_path / "hf")
    with pytest.raises(NotFoundError, match=r"nothing.pt is not there; beside it: no weights"):
        loaded(tmp_path / "nothing.pt")
    with pytest.raises(NotFoundError, match=r"is not there"):
        loaded(tmp_path / "no/such/folder")


def test_a_folder_that_a_trainer_wrote_is_verified_and_read(tmp_path: Path) -> None:
    """Under a manager's record it is a checkpoint like any other."""

    def save(path: str) -> None:
        Path(path).mkdir()
        safetensors.save_file(dict(net(8.0).state_dict()), f"{path}/model.safetensors")

    with CheckpointManager(tmp_path, POLICY, save=save) as manager:
        name = manager.observe({"loss": 1.0}, 1, 0).name  # type: ignore[union-attr]
    assert 8.0 == loaded(tmp_path)
    weights = tmp_path / name / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(CorruptError, match="has other bytes than were written"):
        loaded(tmp_path)


def test_another_models_checkpoint_is_named_as_such() -> None:
    """Nothing fits: the names of both sides say how a key map would have to look."""
    state = {"encoder.w": torch.ones(1), "encoder.b": torch.ones(1)}
    match = r"of another model: .* has encoder.w, encoder.b; wanted are 0.weight, 0.bias"
    with pytest.raises(MismatchError, match=match):
        loaded(state)


def test_what_is_missing_left_over_or_of_another_shape_is_one_error_and_nothing_is_loaded() -> None:
    """Unless one says strict=False: then it is a warning, and what fits is loaded."""
    state = net(7.0).state_dict()
    state["0.weight"] = torch.ones(3, 2)
    state["head"] = state.pop("1.bias")
    model = net(1.0)
    match = r"missing: 1.bias; unexpected: head; of another shape or type: 0.weight \(here \[2, 2\], there \[3, 2\]\)"
    with pytest.raises(MismatchError, match=match):
        load_weights(model, state)
    assert 1.0 == value_of(model)
    with pytest.warns(CheckpointerWarning, match=match):
        report = load_weights(model, state, strict=False)
    assert ("0.bias", "1.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked") == report.loaded
    assert [7.0, 1.0] == [float(model.state_dict()[name].flatten()[0]) for name in ("0.bias", "0.weight")]


def test_a_key_map_renames_by_name_by_prefix_or_by_function() -> None:
    """The longest prefix counts; None leaves a name out; two names must not become one."""
    state = {f"old.{key}": value for key, value in net(7.0).state_dict().items()}
    state["aux"] = state.pop("old.1.bias")
    assert 7.0 == loaded(state, key_map={"old.": "", "aux": "1.bias"})
    assert 7.0 == loaded(state, key_map=lambda key: "1.bias" if key == "aux" else key.removeprefix("old."))
    assert 7.0 == loaded({**net(7.0).state_dict(), "junk.a": torch.ones(1)}, key_map={"junk.": None})
    with pytest.raises(MismatchError, match=r"'old.0.bias' and another name become '0.bias', by key_map="):
        loaded(state, key_map=lambda key: "0.bias")


def test_tied_weights_need_be_there_once() -> None:
    """As safetensors files of Hugging Face have them."""
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    report = load_weights(model, {"embed.weight": torch.full((3, 2), 5.0)})
    assert not report.differences
    assert 5.0 == value_of(model["head"])


def test_wrapped_modules_take_plain_weights(tmp_path: Path) -> None:
    """And an OrderedDict's versions come along."""
    compiled: Any = torch.compile(net(1.0))
    model: nn.Module = nn.DataParallel(compiled)
    state = net(3.0).state_dict()
    assert isinstance(state, OrderedDict)
    load_weights(model, state)
    assert 3.0 == value_of(model)


def test_a_lightning_checkpoint_gives_its_weights(tmp_path: Path) -> None:
    """As Lightning itself writes it: the module's attribute is a prefix, and its other parts are not ours."""
    pl: Any = pytest.importorskip("lightning.pytorch", reason="needs torch-checkpointer[lightning]")
    task: Any = type("Task", (pl.LightningModule,), {})()
    task.scale, task.model = nn.Linear(1, 1), net(5.0)
    task.configure_optimizers = lambda: torch.optim.Adam(task.parameters())
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(**quiet, accelerator="cpu")
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "task.ckpt", weights_only=False)
    assert 5.0 == loaded(tmp_path / "task.ckpt")
