"""What each origin's checkpoints give: step, epoch, scores, best, weights; and what is left, with the reason.

`make.py` beside it made the files with the programs themselves. docs/others.md is the table for people.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import torch
from checkpointer_torch import load_weights
from support.commands import command, snapshot

sys.path.insert(0, str(Path(__file__).parent))
from make import PINS, net

pytest.importorskip("safetensors.torch", reason="needs torch-checkpointer[safetensors]")

FILES: Final = Path(__file__).parent / "files"
NO_STEP: Final = "has no step"
ONLY_EPOCH: Final = "and no step; pass its step"


@attrs.frozen(kw_only=True)
class Origin:
    """What `adopt` and the commands after it make of an origin's directory."""

    flags: tuple[str, ...] = ()
    """Options of `adopt`."""
    adopted: dict[str, tuple[int, int, dict[str, float]]] = attrs.field(factory=dict)
    """Step, epoch and scores by name."""
    format: str = "torch"
    """Whether a checkpoint is a file or a folder."""
    contents: str = "full"
    refused: dict[str, str] = attrs.field(factory=dict)
    """The reason of each checkpoint that cannot be adopted."""
    beside: dict[str, str] = attrs.field(factory=dict)
    """The reason of each file that needs no record."""
    aliases: dict[str, str] = attrs.field(factory=dict)
    best: tuple[str, str, str] | None = None
    """A score, its direction, and the name of the best."""
    part: str | None = None
    """The set of weights, if several may be meant."""


ORIGINS: Final[dict[str, Origin]] = {
    "accelerate": Origin(
        flags=("--pattern", "checkpoint_{step}"),
        adopted={f"checkpoints/checkpoint_{number}": (number, 0, {}) for number in (1, 2)},
        format="folder",
    ),
    "dcp": Origin(adopted={f"step-{step}": (step, 0, {}) for step in (10, 20)}, format="dcp"),
    "fabric": Origin(
        adopted={
            "step-00000010": (10, 0, {}),
            "iter-000040-ckpt.pth": (20, 0, {}),
            "step-00000020": (20, 0, {}),
        },
        format="torch folder",
    ),
    "fastai": Origin(
        flags=("--steps-per-epoch", "2"),
        adopted={"models/model_0.pth": (2, 0, {}), "models/model_1.pth": (4, 1, {})},
        refused={"models/best.pth": "neither the file nor its name has a step or an epoch"},
    ),
    "fvcore": Origin(
        adopted={"model_0000003.pth": (3, 0, {}), "model_0000005.pth": (5, 0, {})},
        aliases={"model_final.pth": "model_0000005.pth"},
    ),
    "hf_export": Origin(beside={"whole": NO_STEP, "sharded": NO_STEP}),
    "hf_trainer": Origin(
        adopted={
            "checkpoint-2": (2, 0, {"loss": 1.3893, "eval_loss": 1.38223}),
            "checkpoint-4": (4, 1, {"loss": 1.38949, "eval_loss": 1.38208}),
        },
        format="folder",
        beside={"model.safetensors": "it belongs together with config.json beside it"},
        best=("eval_loss", "min", "checkpoint-4"),
    ),
    "ignite": Origin(
        flags=("--pattern", "best_model_{epochs}_acc={acc}.pt", "--steps-per-epoch", "4"),
        adopted={
            "checkpoint_8.pt": (8, 1, {}),
            "best_model_2_acc=0.7500.pt": (8, 1, {"acc": 0.75}),
            "checkpoint_12.pt": (12, 2, {}),
            "best_model_3_acc=0.5000.pt": (12, 2, {"acc": 0.5}),
        },
        contents="full weights",
        refused={"weights_-0.2500.pt": "neither the file nor its name has a step or an epoch"},
        best=("acc", "max", "best_model_2_acc=0.7500.pt"),
    ),
    "keras": Origin(refused=dict.fromkeys(("2.keras", "2.weights.h5"), "keras wrote it as HDF5")),
    "lightning": Origin(
        adopted={
            "acc/epoch=0-val/acc=0.20.ckpt": (2, 0, {"val/acc": 0.2}),
            "epoch=1-step=4.ckpt": (4, 1, {"val_loss": 0.5}),
            "epoch=2-step=6.ckpt": (6, 2, {"val_loss": 0.4}),
            "acc/epoch=1-val/acc=0.90.ckpt": (4, 1, {"val/acc": 0.9}),
            "own/m-1-0.90.ckpt": (4, 1, {"val/acc": 0.9}),
            "acc/epoch=2-val/acc=0.70.ckpt": (6, 2, {"val/acc": 0.7}),
        },
        aliases={"last.ckpt": "epoch=2-step=6.ckpt"},
        best=("val/acc", "max", "acc/epoch=1-val/acc=0.90.ckpt"),
    ),
    "mmengine": Origin(adopted={"epoch_2.pth": (4, 1, {}), "epoch_3.pth": (6, 2, {})}),
    "orbax": Origin(refused=dict.fromkeys(("2", "3"), "Orbax for JAX, which is not read here")),
    "peft": Origin(flags=("--step", "adapter=7"), adopted={"adapter": (7, 0, {})}, format="folder", contents="weights"),
    "sb3": Origin(refused={f"rl_model_{step}_steps.zip": "it is a zip file of several files" for step in (8, 16)}),
    "sentence_transformers": Origin(adopted={"checkpoint-2": (2, 0, {})}, format="folder"),
    "skorch": Origin(
        flags=("--pattern", "params_{epochs}.pt", "--steps-per-epoch", "1"),
        adopted={"all/params_1.pt": (1, 0, {}), "all/params_2.pt": (2, 1, {})},
        contents="weights",
        refused={"state": NO_STEP, "safe/params.pt": "neither the file nor its name"},
    ),
    "speechbrain": Origin(
        flags=("--steps-per-epoch", "100"), adopted={"CKPT+two": (200, 1, {"loss": 0.5})}, format="folder"
    ),
    "timm": Origin(
        flags=("--steps-per-epoch", "100"),
        adopted={
            "checkpoint-2.pth.tar": (300, 2, {"metric": 0.75}),
            "checkpoint-3.pth.tar": (400, 3, {"metric": 0.5}),
            "recovery-4-7.pth.tar": (500, 4, {}),
        },
        aliases={"last.pth.tar": "checkpoint-3.pth.tar", "model_best.pth.tar": "checkpoint-2.pth.tar"},
        best=("metric", "max", "checkpoint-2.pth.tar"),
        part="state_dict",
    ),
    "torch_save": Origin(
        flags=("--pattern", "own/model_{step}_{acc}.pt"),
        adopted={
            "model/model-10.pt": (10, 0, {}),
            "numpy.pt": (20, 1, {"val_loss": 0.25}),
            "own/model_20_0.75.pt": (20, 0, {"acc": 0.75}),
            "legacy.pt": (30, 0, {}),
            "own/model_30_0.50.pt": (30, 0, {"acc": 0.5}),
            "pairs/epoch=2_step=300_val=0.12.pt": (300, 2, {"val": 0.12}),
            "dash/checkpoint-500.pt": (500, 0, {}),
            "ckpt/ckpt_1000.pt": (1000, 0, {}),
            "gan/G_1000.pth": (1000, 0, {}),
        },
        contents="full weights",
        refused={
            "script.pt": "it is a TorchScript file",
            "python2.pth": ONLY_EPOCH,
            "tar/checkpoint.pth.tar": r"it has an epoch \(7\) and no step",
            **dict.fromkeys(
                ("best/best_model.pt", "layer/last_layer_only.pt", "module.pt"), "neither the file nor its name"
            ),
        },
        best=("acc", "max", "own/model_20_0.75.pt"),
    ),
    "trl": Origin(
        adopted={
            "checkpoint-1": (1, 0, {"entropy": 2.0792, "loss": 1.56795, "mean_token_accuracy": 1 / 3}),
            "checkpoint-2": (2, 0, {"entropy": 2.07923, "loss": 1.56519, "mean_token_accuracy": 1 / 3}),
        },
        format="folder",
        best=("loss", "min", "checkpoint-2"),
    ),
    "ultralytics": Origin(
        flags=("--steps-per-epoch", "10"), adopted={"last.pt": (40, 3, {"fitness": 0.5})}, part="ema"
    ),
}


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an origin's directory."""
    folder = tmp_path / str(request.param)
    shutil.copytree(FILES / request.param, folder)
    return folder


def test_every_origin_is_in_the_table() -> None:
    """Files without a row prove nothing."""
    assert sorted(ORIGINS) == sorted(folder.name for folder in FILES.iterdir() if folder.is_dir())


@pytest.mark.parametrize(("place", "origin"), ORIGINS.items(), ids=ORIGINS, indirect=["place"])
def test_what_an_origin_wrote_becomes_records(place: Path, origin: Origin) -> None:
    """With its own step, epoch and scores, as a whole or with the reason; a second time changes nothing."""
    before = snapshot(place)
    said = command("adopt", place, *origin.flags, "--json").data
    got = {one["name"]: (one["step"], one["epoch"], one["metrics"]) for one in said["adopted"]}
    assert {name: (*of[:2], pytest.approx(of[2], rel=1e-4)) for name, of in origin.adopted.items()} == got
    assert all(one["format"] in origin.format.split() for one in said["adopted"])
    assert all(one["contents"] in origin.contents.split() for one in said["adopted"])
    assert origin.aliases == said["aliases"]
    for reasons, there in ((origin.refused, said["refused"]), (origin.beside, said["beside"])):
        assert reasons.keys() == there.keys()
        assert all(re.search(reason, there[name]) for name, reason in reasons.items())
    assert before == {path: data for path, data in snapshot(place).items() if not path.startswith(".checkpointer")}
    again = command("adopt", place, *origin.flags, "--json")
    assert (int(bool(origin.refused) or not origin.adopted), []) == (again.code, again.data["adopted"])


@pytest.mark.parametrize(
    ("place", "origin"), [item for item in ORIGINS.items() if item[1].adopted], indirect=["place"],
    ids=[name for name, origin in ORIGINS.items() if origin.adopted],
)  # fmt: skip
def test_what_was_adopted_is_verified_ranked_compared_and_averaged(place: Path, origin: Origin, tmp_path: Path) -> None:
    """By the commands that know nothing of its origin."""
    command("adopt", place, *origin.flags)
    assert 0 == command("verify", place, "--deep").code
    listed = {one["name"]: one["aliases"] for one in command("ls", place, "--json").data}
    assert origin.aliases == {alias: name for name, aliases in listed.items() for alias in aliases}
    if origin.best is not None:
        by, mode, name = origin.best
        run = next(one["run"] for one in command("ls", place, "--json").data if one["name"] == name)
        said = command("best", place, "--by", by, "--mode", mode, "--run", run)
        assert f"{place / name}\n" == said.out
    names, only = [*origin.adopted][:2], ("--only", origin.part) if origin.part else ()
    if len(names) == 2 and origin.format != "torch folder":
        assert command("diff", place, *names).code in (0, 1)
        said = command("average", place, *names, *only, "-o", tmp_path / "mean.pt")
        assert (0, "") == (said.code, said.err)


def units() -> Iterator[tuple[str, str | None, Any]]:
    """Yield each checkpoint, the part of it that is meant, and what makes its model."""
    for name, origin in ORIGINS.items():
        for unit in (*origin.adopted, *origin.aliases, *origin.refused):
            is_own = name in ("trl", "peft", "sentence_transformers", "ultralytics") or "python2" in unit
            yield f"{name}/{unit}", origin.part, None if is_own else net


READ: Final = {path: (part, make) for path, part, make in units() if not re.search(r"keras|orbax|sb3|script", path)}
UNREAD: Final = {
    "keras/2.keras": "zip file without one data.pkl",
    "keras/2.weights.h5": "it is an HDF5 file, as keras writes",
    "orbax/2": "(holds|has) no weights",
    "sb3/rl_model_8_steps.zip": "zip file without one data.pkl",
    "torch_save/script.pt": "it is a TorchScript file .*torch.jit.load",
}


@pytest.mark.parametrize("path", [path for path in READ if not path.startswith("hf")])
def test_the_weights_are_shown_exported_and_loaded(path: str, tmp_path: Path) -> None:
    """Without a record, from the file or folder alone; the model that wrote them takes what was exported."""
    part, make = READ[path]
    only = ("--only", part) if part else ()
    shown = command("show", FILES / path)
    assert (0, True) == (shown.code, "weights:" in shown.out)
    said = command("export", FILES / path, tmp_path / "out.pt", *only)
    assert (0, "") == (said.code, said.err)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    if make is not None:
        model = make()
        prefix = "net." if path.startswith(("lightning", "mmengine")) else ""
        model.load_state_dict({name.removeprefix(prefix): value for name, value in found.items()}, strict=True)
        other = make()
        load_weights(other, FILES / path, part=part)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


class Head(torch.nn.Module):
    """The head of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(2, 8, bias=False)


def test_the_weights_of_a_language_model_are_exported_and_loaded(tmp_path: Path) -> None:
    """In one file or in shards, from an export or from a trainer's checkpoint; the tied head has its name again."""
    for number, path in enumerate(path for path in READ if path.startswith("hf")):
        said = command("export", FILES / path, tmp_path / f"{number}.pt")
        assert (0, "") == (said.code, said.err)
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert (17, True) == (len(found), torch.equal(found["transformer.wte.weight"], found["lm_head.weight"]))
        head = Head()
        load_weights(head, FILES / path, strict=False, key_map={"transformer.": None})
        assert torch.equal(found["lm_head.weight"], head.lm_head.weight)


@pytest.mark.parametrize(("path", "reason"), UNREAD.items(), ids=UNREAD)
def test_what_is_not_read_is_named(path: str, reason: str, tmp_path: Path) -> None:
    """With what it is, and not as a traceback."""
    said = command("export", FILES / path, tmp_path / "out.pt")
    assert 2 == said.code
    assert re.search(reason, said.err)
    with pytest.raises(Exception, match=reason):
        load_weights(net(), FILES / path)


# The table in docs/others.md

ROWS: Final = {
    re.sub(r".*operations/(\w+)\.txt.*", r"\1", line): line.split(" | ")
    for line in (Path(__file__).parents[2] / "docs/others.md").read_text().splitlines()
    if "operations/" in line
}
LOADED: Final = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".tar")


def written(origin: str) -> str:
    """Return how a program makes its files of tensors, by what strace saw."""
    lines = (Path(__file__).parent / "operations" / f"{origin}.txt").read_text().splitlines()
    made = [line.removeprefix("write ") for line in lines if line.startswith("write ")]
    final = [
        name for name in made if name.endswith((*LOADED, ".zip", ".keras", ".h5", ".distcp")) and "tmp" not in name
    ]
    return "in place" if final else "renamed"


def test_the_table_for_people_has_each_origin_with_its_version() -> None:
    """And says of each how its files come to be."""
    assert ORIGINS.keys() == ROWS.keys()
    for origin, (name, *_, how, _removed) in ROWS.items():
        version = PINS[origin].split(" ")[0].partition("==")[2] or "2.13.0"
        assert (origin, version in name, f"[{written(origin)}]") == (origin, True, how.partition("(")[0])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_table_for_people_names_the_files_that_a_safe_load_refuses() -> None:
    """By file; "each file" stands for all."""
    refused: dict[str, set[str]] = {origin: set() for origin in ORIGINS}
    for path in FILES.rglob("*"):
        if path.is_file() and path.name.endswith(LOADED):
            try:
                torch.load(path, weights_only=True)
            except Exception:
                refused[path.relative_to(FILES).parts[0]].add(path.name)
    for origin, (_, _, objects, *_) in ROWS.items():
        for file in refused[origin]:
            assert (origin, True) == (origin, "each file" in objects or re.sub(r"model_\d", "model_1", file) in objects)
        assert (origin, bool(refused[origin])) == (origin, objects != "none") or objects in {
            "`data` in it", "HDF5", "OCDBT", "none that is read",
        }  # fmt: skip
