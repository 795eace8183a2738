"""Whether a folder that the Trainer wrote is whole, as far as the folder alone shows it."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from checkpointer.formats.pickler import check_whole
from checkpointer.storage import open_storage

STATE_FILE: Final = "trainer_state.json"
"""The Trainer's state of the training; it writes this file last."""

_NAME: Final = re.compile(r"checkpoint-(\d+)")
_WEIGHTS: Final = re.compile(
    r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)|adapter_model\.(safetensors|bin)|pytorch_model_fsdp.*|global_step\d+"
)
_SHARDED: Final = ("pytorch_model_fsdp", "optimizer_", "optimizer.bin", "global_step")
"""Names of FSDP and DeepSpeed, which keep the optimizer elsewhere."""
_ZIPPED: Final = (".pt", ".pth", ".bin")


def step_of(name: str) -> int | None:
    """Return the step in a checkpoint's name as the Trainer reads it; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def checkpoints_of(folder: Path) -> list[str]:
    """Return the names in a folder that the Trainer would resume from, newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    steps = {path.name: step for path in paths if (step := step_of(path.name)) is not None}
    return sorted(steps, key=lambda name: steps[name], reverse=True)


def problem_of(folder: Path, *, ranks: int | None = None) -> str | None:
    """Return why a folder is not a whole checkpoint, or None if it looks like one.

    Compares which files exist and how they end: it finds a torn file, but not changed bytes. All that the Trainer
    writes before `STATE_FILE` must be there with it.

    Args:
        folder: The folder.
        ranks: How many processes wrote it; None if that is not known.
    """
    state = _read_json(folder / STATE_FILE)
    if not isinstance(state, dict):
        return f"{STATE_FILE} is missing or torn"
    if state.get("global_step") != step_of(folder.name):
        return f"{STATE_FILE} is of step {state.get('global_step')}"
    files = [path for name in sorted(open_storage(folder, "").list()) if (path := folder / name).is_file()]
    return _missing(folder, ranks) or next(filter(None, map(_torn, files)), None)


def refuse_shards(folder: Path, optimizer: Any) -> None:
    """Raise `SaveError` if other ranks hold parts of an optimizer that the Trainer has written on rank 0 alone.

    So it is with tensor parallelism. Under FSDP and DeepSpeed the Trainer has other files for the optimizer.
    """
    if not (folder / "optimizer.pt").exists():
        return
    for number, group in enumerate(getattr(optimizer, "param_groups", ())):
        for place, parameter in enumerate(group["params"]):
            check_whole(parameter, f"in optimizer.pt: optimizer.param_groups[{number}]['params'][{place}]")


def _missing(folder: Path, ranks: int | None) -> str | None:
    names = {path.name for path in folder.iterdir()}
    below = {path.name for path in folder.glob("*/*")}
    if not any(_WEIGHTS.fullmatch(name) for name in names | below):
        return "it has no weights"
    is_sharded = any(name.startswith(_SHARDED) for name in names)
    if ("optimizer.pt" in names) != ("scheduler.pt" in names) and not is_sharded:
        return "one of optimizer.pt and scheduler.pt is missing"
    found = sorted(int(match[1]) for name in names if (match := re.fullmatch(r"rng_state_(\d+)\.pth", name)))
    if found and (len(found) == 1 or found != list(range(ranks or len(found)))):
        return "the random state of some ranks is missing"
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if index in names and (absent := _shards(folder / index) - names):
            return f"{index} names {', '.join(sorted(absent))}, which is missing"
    return None


def _shards(index: Path) -> set[str]:
    data = _read_json(index)
    shards = data.get("weight_map") if isinstance(data, dict) else None
    return set(map(str, shards.values())) if isinstance(shards, dict) else {"shards that can be read"}


def _torn(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np"):
                whole = True
        elif path.suffix in _ZIPPED:
            whole = zipfile.is_zipfile(path) or _is_old_torch(path)
        else:
            whole = path.suffix != ".json" or _read_json(path) is not None
    except SafetensorError:
        whole = False
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    return None if whole else f"{path.name} is torn"


def _is_old_torch(path: Path) -> bool:
    """Return whether it is a whole file of torch before 1.6, or of pickle: it then ends as a pickle does."""
    with open(path, "rb") as stream:
        if stream.read(1) != b"\x80":
            return False
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"."


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
