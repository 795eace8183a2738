"""Reads what a checkpoint that others wrote says of itself: step, epoch and scores. Nothing is unpickled."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import attrs

from checkpointer.errors import CorruptError
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.formats.inspection.safetensors_file import SafetensorsContents
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer.ports import Storage
from checkpointer.records.record import Contents

__all__ = ["Said", "read_file", "read_folder"]

MAX_STATE_BYTES: Final = 1 << 26
_HF_STATE: Final = "trainer_state.json"
_STEPS: Final = (
    *("global_step", "step", "steps", "num_steps", "iteration", "iterations", "iter", "n_iter", "iter_num"),
    *("num_iters", "num_updates", "global_iter"),
)
_EPOCHS: Final = ("epoch", "epochs", "current_epoch")
_HOLDERS: Final = ("", "meta.", "trainer.", "engine.")
"""Under which keys a counter is believed: the top, and where mmengine and ignite keep theirs."""
_BESIDE: Final = (*_STEPS, *_EPOCHS, "seed", "version", "batch_size", "num_epochs", "max_epochs", "total_flos", "time")
_PAIR: Final = re.compile(r"(?:^|[-/])([A-Za-z][\w. ]*)=(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?=-|$)")


@attrs.frozen(kw_only=True)
class Said:
    """What a file or folder says of itself."""

    name: str
    step: int | None
    """None if it does not say."""
    epoch: int | None = None
    """None if it does not say."""
    epoch_end: bool = True
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    format: str = "torch"
    contents: Contents = "full"
    writer: str
    """``Lightning``, ``the HF Trainer``, ``torch.save`` or ``a trainer``."""


def read_file(storage: Storage, name: str) -> Said:
    """Return what a file says of itself.

    Raises:
        CorruptError: If it is not a checkpoint.
    """
    with open_contents(storage, name) as contents:
        if "pytorch-lightning_version" in contents.others or "loops" in _tops(contents):
            return _lightning(name, f"{storage}/{name}", contents)
        return _bare(name, contents)


def read_folder(storage: Storage, name: str) -> Said:
    """Return what a folder says of itself, as a whole.

    Raises:
        CorruptError: If the HF Trainer's state in it cannot be read.
    """
    files = [path[len(name) + 1 :] for path in storage.list(name)]
    if _HF_STATE in files:
        return _hugging_face(storage, name, files)
    in_name = _from_name(name)
    return Said(
        name=name,
        step=_first(in_name, _STEPS),
        epoch=_first(in_name, _EPOCHS),
        format="dcp" if ".metadata" in files else "folder",
        contents=_contents_of(files),
        writer="a trainer",
    )


def _contents_of(files: Sequence[str]) -> Contents:
    # A DCP folder and DeepSpeed's hold both, under names that do not say so.
    is_full = any("optim" in path or path.endswith((".distcp", "model_states.pt")) for path in files)
    return "full" if is_full else "weights"


# Lightning


def _lightning(name: str, place: str, contents: Tensors) -> Said:
    step, epoch = contents.others.get("global_step"), contents.others.get("epoch")
    if not isinstance(step, int) or not isinstance(epoch, int):
        msg = "Lightning wrote it, but it has no global_step or epoch"
        raise CorruptError(msg)
    processed = contents.others.get("loops.fit_loop.epoch_progress.current.processed")
    return Said(
        name=name,
        step=step,
        epoch=epoch,
        epoch_end=processed > epoch if isinstance(processed, int) else True,
        metrics=_lightning_scores(name, place, contents),
        contents="full" if any(top.startswith("optim") for top in _tops(contents)) else "weights",
        writer="Lightning",
    )


def _lightning_scores(name: str, place: str, contents: Tensors) -> dict[str, float]:
    """Return the scores in the file's name, and those of each callback that says that it wrote this very file."""
    in_name = _texts_in_name(name)
    scores = {key: float(text) for key, text in in_name.items() if key not in ("epoch", "step")}
    for monitor, path, score in _named_scores(contents, place):
        text = in_name.get(monitor)
        # The name is the file's own. A callback may only give the digits that the name has rounded away.
        if path and (text is None or _is_rounded(score, text)):
            scores[monitor] = score
    return scores


def _named_scores(contents: Tensors, place: str) -> Iterator[tuple[str, str, float]]:
    """Yield monitor, path and score for each callback whose best checkpoints name the file at ``place``.

    The directory may have been moved, so that of several paths with its name the one that agrees furthest is meant.
    """
    found: list[tuple[int, str, str, float]] = []
    for key, monitor in contents.others.items():
        callback, _, field = key.rpartition(".")
        if field != "monitor" or not callback.startswith("callbacks.") or not isinstance(monitor, str):
            continue
        for path, key_of_score in _best_paths(contents, callback):
            common, score = _common(path, place), _number(contents, key_of_score)
            if common and score is not None:
                found.append((common, monitor, path, score))
    furthest = max((common for common, *_ in found), default=0)
    nearest = [(monitor, path, score) for common, monitor, path, score in found if common == furthest]
    # Two callbacks with a file of this name each, and it is not known which of them this one is of.
    if len({path for _, path, _ in nearest}) == 1:
        yield from nearest


def _best_paths(contents: Tensors, callback: str) -> Iterator[tuple[str, str]]:
    """Yield the paths that a callback has a score for, and the key of the score."""
    best = f"{callback}.best_k_models."
    for key in (*contents.tensors, *contents.others):
        if key.startswith(best):
            yield key[len(best) :], key
    path = contents.others.get(f"{callback}.best_model_path")
    if isinstance(path, str) and path:
        yield path, f"{callback}.best_model_score"


def _common(one: str, other: str) -> int:
    """Return how many folders two paths have in common from their ends on, the file's own name included."""
    count = 0
    for ours, theirs in zip(*(reversed(re.split(r"[/\\]+", path)) for path in (one, other)), strict=False):
        if ours != theirs:
            break
        count += 1
    return count


def _number(contents: Tensors, key: str) -> float | None:
    if key in contents.tensors:
        return float(contents.read(key)) if contents.tensors[key].numel == 1 else None
    value = contents.others.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _is_rounded(score: float, text: str) -> bool:
    """Return whether ``text`` is the score with fewer digits."""
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return abs(score - float(text)) <= 0.5000001 * 10.0**-decimals


# The Hugging Face Trainer


def _hugging_face(storage: Storage, name: str, files: Sequence[str]) -> Said:
    try:
        with storage.open(f"{name}/{_HF_STATE}") as stream:
            state = json.loads(stream.read(MAX_STATE_BYTES))
        step, epoch = int(state["global_step"]), float(state.get("epoch") or 0)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        msg = f"its {_HF_STATE} cannot be read ({type(error).__name__}: {error})"
        raise CorruptError(msg) from error
    logged = [
        entry for entry in state.get("log_history") or [] if isinstance(entry, dict) and entry.get("step") == step
    ]
    metrics = {
        key: float(value)
        for entry in logged
        for key, value in entry.items()
        if key not in ("step", "epoch") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    ended = epoch.is_integer() and epoch > 0
    return Said(
        name=name,
        step=step,
        epoch=max(int(epoch) - ended, 0),
        epoch_end=ended,
        metrics=metrics,
        format="folder",
        contents="full" if {"optimizer.pt", "optimizer.bin"}.intersection(files) else "weights",
        writer="the HF Trainer",
    )


# Anything else


def _bare(name: str, contents: Tensors) -> Said:
    if not contents.tensors:
        msg = "there is no tensor in it, so it is not a checkpoint"
        raise CorruptError(msg)
    in_name = _from_name(name)
    numbers = dict(_numbers(contents))
    step, epoch = _counter(contents, numbers, _STEPS), _counter(contents, numbers, _EPOCHS)
    in_epoch = _counter(contents, numbers, ("epoch_length",))
    ends = True
    if step and in_epoch and epoch is None:  # ignite counts iterations, and knows how many an epoch has.
        epoch, ends = (step - 1) // in_epoch, step % in_epoch == 0
    texts = _texts_in_name(name)
    scores = {key: float(text) for key, text in texts.items()}
    for key, value in numbers.items():
        # The best score so far is another checkpoint's.
        if "best" not in key.lower() and (key not in texts or _is_rounded(value, texts[key])):
            scores[key] = value
    is_torch = not isinstance(contents, SafetensorsContents)
    return Said(
        name=name,
        step=_first(in_name, _STEPS) if step is None else step,
        epoch=_first(in_name, _EPOCHS) if epoch is None else epoch,
        epoch_end=ends,
        metrics={key: value for key, value in scores.items() if key not in _BESIDE},
        format="torch" if is_torch else "safetensors",
        contents="full" if is_torch and any("optim" in top for top in _tops(contents)) else "weights",
        writer="torch.save",
    )


def _tops(contents: Tensors) -> set[str]:
    return {key.partition(".")[0] for key in (*contents.tensors, *contents.others)}


def _numbers(contents: Tensors) -> Iterator[tuple[str, float]]:
    """Yield the numbers at the top of a saved dict, tensors of one element included, and those of a dict of metrics."""
    for key, value in contents.others.items():
        name = key.removeprefix("metrics.")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "." not in name:
            yield name, float(value)
    # A plain state_dict may have weights that are scalars: it has no numbers beside them.
    for key, info in contents.tensors.items() if contents.others else ():
        name = key.removeprefix("metrics.")
        if not info.shape and "." not in name:
            yield name, float(contents.read(key))


def _counter(contents: Tensors, top: Mapping[str, float], names: Sequence[str]) -> int | None:
    """Return a counter from the top of a saved dict, or from one level down where others keep theirs."""
    for holder in _HOLDERS:
        found = {key: _number(contents, f"{holder}{key}") for key in names} if holder else top
        count = _first({key: value for key, value in found.items() if value is not None}, names)
        if count is not None:
            return count
    return None


def _first(numbers: Mapping[str, float], names: Sequence[str]) -> int | None:
    for name in names:
        value = numbers.get(name)
        if value is not None and math.isfinite(value) and value >= 0 and float(value).is_integer():
            return int(value)
    return None


def _texts_in_name(name: str) -> dict[str, str]:
    """Return what a file name says as ``name=value``."""
    stem = re.sub(r"\.(ckpt|pt|pth|safetensors)$", "", name.rpartition("/")[2])
    return dict(_PAIR.findall(re.sub(r"-v\d+$", "", stem)))


def _from_name(name: str) -> dict[str, float]:
    """Return what a file name says as ``name=value``, and ``epoch`` or ``step`` with a number after it.

    The only place where a name is believed: there is no record that says the step.
    """
    found = {key: float(value) for key, value in _texts_in_name(name).items()}
    stem = re.sub(r"\.(ckpt|pt|pth|safetensors)$", "", name.rpartition("/")[2])
    for key in ("epoch", "step", "iter"):
        match = re.search(rf"(?:^|[^A-Za-z]|(?<=global)){key}[-_]?(\d+)(?:$|[^\d.])", stem)
        if match and key not in found:
            found[key] = float(match[1])
    return found
