"""Files that other programs wrote: their weights are found, read and exported without unpickling anything.

`foreign/make.py` made the files in ``foreign/files`` with the programs themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from checkpointer_torch import load_weights
from support.commands import command
from torch import nn

from checkpointer import CheckpointManager, EverySteps, KeepAll, Policy
from checkpointer.errors import MismatchError
from checkpointer.formats.export import write_weights
from checkpointer.formats.inspection.find_weights import weights_of
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.storage import LocalStorage

safetensors = pytest.importorskip("safetensors.torch", reason="needs torch-checkpointer[safetensors]")

FOREIGN: Final = Path(__file__).parents[1] / "foreign/files"
EXPECTED: Final[dict[str, dict[str, list[Any]]]] = json.loads((FOREIGN / "expected.json").read_text())
FILES: Final = {
    "skorch/safe/params.pt": None,
    "timm/last.pth.tar: state_dict": "state_dict",
    "timm/last.pth.tar: state_dict_ema": "state_dict_ema",
    "mmengine/epoch_3.pth": None,
    "speechbrain/CKPT+two": None,
    "ultralytics/last.pt": None,
}
"""Each with the part that has to be named, because several fit."""


def net(name: str) -> nn.Module:
    """Return the model that `foreign/make.py` trains with a program, with other weights."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return nn.ModuleDict({"net": model}) if name.startswith("mmengine") else model


def same_sums(expected: Mapping[str, list[Any]], state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a state is what ``expected.json`` says of it, as far as sums show."""
    return expected.keys() == state.keys() and all(
        expected[name][0] == [*value.shape] and math.isclose(expected[name][1], value.double().sum(), rel_tol=1e-12)
        for name, value in state.items()
    )


def exported(place: Path, name: str, out: Path, part: str | None = None) -> dict[str, torch.Tensor]:
    """Return what is exported of a payload."""
    with open_contents(LocalStorage(place, ""), name) as contents:
        assert [] == [*contents.problems()]
        weights = weights_of(contents, part)
        write_weights(out, weights.tensors, weights.read)
    state = safetensors.load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)
    return dict(state)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("file", FILES)
def test_what_a_program_wrote_is_exported_as_its_own_state(file: str, suffix: str, tmp_path: Path) -> None:
    """Names, shapes and values are those of the model's `state_dict`, whatever the extension says."""
    found = exported(FOREIGN, file.partition(": ")[0], tmp_path / f"out{suffix}", FILES[file])
    assert EXPECTED[file].keys() == found.keys()
    assert same_sums(EXPECTED[file], found)
    if not file.startswith("ultralytics"):
        net(file).load_state_dict(found, strict=True)


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("ultralytics")])
def test_what_a_program_wrote_is_loaded_into_its_model(file: str) -> None:
    """By path alone, or with the part where an average lies beside the model."""
    model = net(file)
    load_weights(model, FOREIGN / file.partition(": ")[0], part=FILES[file])
    assert same_sums(EXPECTED[file], model.state_dict())


def test_a_model_and_its_average_are_named_and_none_is_chosen(tmp_path: Path) -> None:
    """The same answer in `load_weights` and in `export`, with what to pass."""
    match = r"several sets of weights may be meant: state_dict \(9 tensors\), state_dict_ema \(9 tensors\).*"
    with pytest.raises(MismatchError, match=match + r"part='state_dict' \(on the command line --only state_dict\)"):
        load_weights(net("timm"), FOREIGN / "timm/last.pth.tar")
    with pytest.raises(MismatchError, match=match):
        exported(FOREIGN, "timm/last.pth.tar", tmp_path / "out.pt")


def test_a_pickled_detector_is_exported_without_its_code(tmp_path: Path) -> None:
    """The module's class is not imported; a buffer that is not persistent is left out, as its `state_dict` does."""
    found = exported(FOREIGN, "ultralytics/last.pt", tmp_path / "out.pt", "ema")
    assert "model.0.conv.weight" in found
    assert {torch.float16, torch.int64} == {value.dtype for value in found.values()}


def load_lightning(tmp_path: Path) -> tuple[Any, Path]:
    """Return a Lightning module that was trained for a step, and its checkpoint; objects lie beside the weights."""
    pl: Any = pytest.importorskip("lightning.pytorch", reason="needs torch-checkpointer[lightning]")
    import argparse
    import enum

    class Kind(enum.Enum):
        BIG = 1

    class Task(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
            self.ema_model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
            self.head = nn.Linear(2, 3)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    Kind.__qualname__ = "Kind"
    globals()["Kind"] = Kind
    task = Task(args=argparse.Namespace(lr=0.1, path=tmp_path), kind=Kind.BIG)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(**quiet, accelerator="cpu")
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "task.ckpt", weights_only=False)
    return task, tmp_path / "task.ckpt"


def test_a_lightning_checkpoint_with_objects_beside_the_weights_is_read(tmp_path: Path) -> None:
    """A Namespace, an Enum and a Path among the hyperparameters stay unread; a module is found by names and shapes."""
    task, path = load_lightning(tmp_path)
    with pytest.raises(Exception, match="Unsupported"):
        torch.load(path, weights_only=True)
    found = exported(tmp_path, "task.ckpt", tmp_path / "out.safetensors")
    task.load_state_dict(found, strict=True)
    head = nn.Linear(2, 3)
    load_weights(head, path)
    assert torch.equal(task.head.weight, head.weight)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(MismatchError, match=r"task.ckpt: several .*: state_dict.model, state_dict.ema_model; choose"):
        load_weights(model, path)
    load_weights(model, path, part="state_dict.ema_model")
    assert same_state(task.ema_model.state_dict(), model.state_dict())


POLICY: Final = Policy(EverySteps(5), [KeepAll()], last=None, rescue=False)


def hugging_face() -> Any:
    """Return the helpers of the adapter's own tests."""
    pytest.importorskip("transformers", reason="needs torch-checkpointer[transformers]")
    pytest.importorskip("accelerate", reason="needs torch-checkpointer[transformers]")
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "transformers"))
    import hf_tiny

    return hf_tiny


def same_state(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    """Return whether names and values agree."""
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_trainers_checkpoint_is_exported_averaged_and_loaded(tmp_path: Path) -> None:
    """Of all that is in the folder, the model's files are the weights; a tied head has both of its names again."""
    tiny = hugging_face()
    trainer = tiny.make_trainer(tmp_path / "run", POLICY)
    trainer.train()
    out = tmp_path / "out.safetensors"
    said = command("export", tmp_path / "run", "checkpoint-10", out)
    assert (0, "") == (said.code, said.err)
    state = safetensors.load_file(out)
    model = tiny.make_model()
    model.load_state_dict(state, strict=True)
    assert same_state(trainer.model.state_dict(), model.state_dict())
    assert "lm_head.weight" in state
    fresh = tiny.make_model()
    load_weights(fresh, tmp_path / "run")
    assert same_state(trainer.model.state_dict(), fresh.state_dict())
    names = ("checkpoint-5", "checkpoint-10")
    said = command("average", tmp_path / "run", *names, "-o", tmp_path / "mean.safetensors")
    assert (0, "") == (said.code, said.err)
    mean = safetensors.load_file(tmp_path / "mean.safetensors")
    files = [safetensors.load_file(tmp_path / "run" / name / "model.safetensors") for name in names]
    for name in files[0]:
        assert torch.allclose((files[0][name] + files[1][name]) / 2, mean[name])
    assert 1 == command("diff", tmp_path / "run", *names).code


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_shards_are_one_set_of_weights(tmp_path: Path) -> None:
    """Joined by the index that `save_pretrained` writes."""
    tiny = hugging_face()
    model = tiny.make_model()

    def save(path: str) -> None:
        model.save_pretrained(path, max_shard_size="10kB")

    with CheckpointManager(tmp_path / "run", POLICY, save=save) as manager:
        manager.observe({}, step=5, epoch=0)
    assert len([*(tmp_path / "run" / manager.records[0].name).glob("model-*.safetensors")]) > 1
    assert 0 == command("export", tmp_path / "run", 5, tmp_path / "out.pt").code
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert same_state(model.state_dict(), found)
    fresh = tiny.make_model()
    torch.nn.init.zeros_(fresh.lm_head.weight)
    load_weights(fresh, tmp_path / "run")
    assert same_state(model.state_dict(), fresh.state_dict())


@pytest.mark.parametrize(
    ("said", "tied"),
    [({}, True), ({"tie_word_embeddings": True}, True)]
    + [({"tie_word_embeddings": value}, False) for value in (False, None)],
)
def test_the_head_that_a_file_lacks_is_the_embedding_unless_the_config_denies_it(
    tmp_path: Path, said: dict[str, Any], tied: bool
) -> None:
    """transformers 4 leaves ``tie_word_embeddings`` out of config.json if it is true."""
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    embedding = torch.arange(6.0).reshape(3, 2)
    safetensors.save_file({"transformer.wte.weight": embedding}, folder / "model.safetensors")
    config = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 3, **said}
    (folder / "config.json").write_text(json.dumps(config))
    found = exported(tmp_path, "checkpoint-5", tmp_path / "out.pt")
    expected = {"transformer.wte.weight", "lm_head.weight"} if tied else {"transformer.wte.weight"}
    assert expected == found.keys()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_adapter_is_exported_as_an_adapter(tmp_path: Path) -> None:
    """PEFT's own function takes what was exported and averaged."""
    tiny = hugging_face()
    peft: Any = pytest.importorskip("peft", reason="needs peft")

    def adapted() -> Any:
        return peft.get_peft_model(
            tiny.make_model(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        )

    trainer = tiny.make_trainer(tmp_path / "run", POLICY, model=adapted())
    trainer.train()
    assert 0 == command("export", tmp_path / "run", "checkpoint-10", tmp_path / "out.safetensors").code
    found = safetensors.load_file(tmp_path / "out.safetensors")
    fresh = adapted()
    result = peft.set_peft_model_state_dict(fresh, found)
    assert not result.unexpected_keys
    assert same_state(peft.get_peft_model_state_dict(trainer.model), peft.get_peft_model_state_dict(fresh))
    said = command("average", tmp_path / "run", "checkpoint-5", "checkpoint-10", "-o", tmp_path / "mean.safetensors")
    assert 0 == said.code
    assert found.keys() == safetensors.load_file(tmp_path / "mean.safetensors").keys()


def test_a_state_that_accelerate_saved_is_exported(tmp_path: Path) -> None:
    """Two models in one folder are named; one is found among optimizer, scheduler and random states."""
    accelerate: Any = pytest.importorskip("accelerate", reason="needs torch-checkpointer[transformers]")
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    optimizer = torch.optim.Adam(models[0].parameters())
    models[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for count in (1, 2):
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(*models[:count], optimizer)
        accelerator.save_state(str(tmp_path / f"checkpoint_{count}"))
    found = exported(tmp_path, "checkpoint_1", tmp_path / "out.pt")
    nn.Linear(2, 2).load_state_dict(found, strict=True)
    assert same_state(models[0].state_dict(), found)
    with pytest.raises(MismatchError, match=r"model.safetensors \(2 tensors\), model_1.safetensors \(2 tensors\)"):
        exported(tmp_path, "checkpoint_2", tmp_path / "two.pt")
