"""Finds checkpoints that other programs wrote, and reads their step, epoch and scores. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
import math
import operator
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Final

import attrs

from checkpointer._validation import brief
from checkpointer.commit.index import HOME, directories_below
from checkpointer.commit.payload_names import location
from checkpointer.errors import CorruptError, reading
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.formats.inspection.safetensors_file import SafetensorsContents
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer.ports import Storage
from checkpointer.records.codec import as_number
from checkpointer.records.record import Contents
from checkpointer.tools.adopt_names import SUFFIXES, copy_of, numbers_in, only_number_in, texts_in
from checkpointer.tools.query import NO_SCORE

MAX_STATE_BYTES: Final = 1 << 26
MAX_COUNT: Final = 1 << 63
"""Steps and epochs are below this, as in records."""
_MAX_PATH: Final = 4096
_EXPONENT: Final = 5
"""Characters of an exponent that count."""
_MAX_EXPONENT: Final = 308
_HF_STATE: Final = "trainer_state.json"
_STEPS: Final = (
    *(
        "global_step",
        "step",
        "steps",
        "num_steps",
        "step_count",
        "iteration",
        "iterations",
        "iter",
        "n_iter",
        "iter_num",
    ),
    *("num_iters", "num_updates", "global_iter"),
)
_EPOCHS: Final = ("epoch", "epochs", "current_epoch")
_HOLDERS: Final = ("meta.", "trainer.", "engine.")
"""A counter counts at the top, and under these keys of mmengine and ignite."""
_METRICS: Final = ("metrics.", "train_metrics.")
"""Scores count at the top, and under these keys; the second one is of Ultralytics."""
_BESIDE: Final = (
    *_STEPS,
    *_EPOCHS,
    "seed",
    "version",
    "batch_size",
    "num_epochs",
    "max_epochs",
    "total_flos",
    "time",
    "updates",
)
_IN_FOLDERS: Final = (*SUFFIXES, ".bin", ".distcp", "/trainer_state.json")
"""A folder with a file of one of these may be a checkpoint."""
_NAMED: Final = re.compile(
    r"(?:(?:checkpoint|ckpt|global_?step|step|epoch|iteration|iter|ep|ba)[-_+=]?\d+[-_+=]?)+"
    r"|CKPT\+.*|.*\.(?:ckpt|pt|pth|dcp)",
    re.IGNORECASE,
)
"""The name of a folder that is one checkpoint: accelerate's, DeepSpeed's, speechbrain's, Lightning's."""
_UNREAD: Final = {
    r"(?:.*/)?_CHECKPOINT_METADATA": "it is a checkpoint of Orbax for JAX, which is not read here",
    r".*\.(?:keras|weights\.h5)": "keras wrote it as HDF5, which is not read here",
    r"(?:.*/)?(?:rl_model_\d+_steps|best_model|final_model)\.zip": (
        "it is a zip file of several files, as Stable-Baselines3 writes, which is not read here"
    ),
}
"""Names of files that other programs wrote, and why they are left."""
_SHARD: Final = re.compile(r".*-\d+-of-\d+\.\w+")
_EXPORT: Final = re.compile(r"(?:model|pytorch_model|adapter_model|diffusion_pytorch_model|consolidated[\w.]*)\.\w+")
_EXPORTED: Final = re.compile(r"(?:config|adapter_config|model_index)\.json|.*\.index\.json")
_STATE: Final = re.compile(
    r"(?:optim\w*|(?:lr_?)?sched\w*|scaler|random_states?\w*|rng\w*|criterion|counter|brain)"
    r"\.(?:bin|pt|pth|ckpt|pkl|safetensors)|CKPT\.yaml|trainer_state\.json|training_args\.bin"
)


# Files and folders


@attrs.frozen(kw_only=True)
class Units:
    """Files and folders that may be adopted, and files that may not."""

    files: tuple[str, ...]
    """Files that may be a checkpoint each."""
    folders: tuple[str, ...]
    """Folders that may be a checkpoint each, as a whole."""
    left: dict[str, str]
    """Files that belong to others, each with the reason."""
    refused: dict[str, str]
    """Checkpoints that cannot be read, each with the reason."""


def find_units(files: Iterable[str], taken: Collection[str] = ()) -> Units:
    """Sort the files of a directory into units. What lies in a directory with records of its own is left out."""
    paths = sorted(files)
    closed = {HOME, *taken, *directories_below(paths)}
    beside: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder, _, name = path.rpartition("/")
        beside[folder].add(name)
    folders: dict[str, None] = {}
    alone: list[str] = []
    left: dict[str, str] = {}
    refused: dict[str, str] = {}
    for path in paths:
        above = [path[:i] for i, char in enumerate(path) if char == "/"]
        if not closed.isdisjoint((path, *above)):
            continue
        if unread := next((why for form, why in _UNREAD.items() if re.fullmatch(form, path)), ""):
            refused[path.removesuffix("/_CHECKPOINT_METADATA")] = unread
        if not path.endswith(_IN_FOLDERS):
            continue
        folder, _, name = path.rpartition("/")
        unit = next((it for it in above if _NAMED.fullmatch(it.rpartition("/")[2]) or ".metadata" in beside[it]), "")
        reason = "" if unit else _belongs(name, beside[folder])
        if unit or (reason and folder):
            folders[unit or folder] = None
        elif path.endswith(SUFFIXES) and reason:
            left[path] = reason
        elif path.endswith(SUFFIXES):
            alone.append(path)
    return Units(files=tuple(alone), folders=tuple(folders), left=left, refused=refused)


def _belongs(name: str, beside: Iterable[str]) -> str:
    """Return why a file is one part of several; empty if it is not."""
    if _SHARD.fullmatch(name):
        return "it is one of several shards, and one record names one file or one folder; put them into a folder"
    others = sorted(other for other in beside if other != name)
    with_it = [other for other in others if _EXPORTED.fullmatch(other)] if _EXPORT.fullmatch(name) else []
    if _STATE.fullmatch(name):
        with_it = others
    elif not any(char.isdigit() for char in name) and not copy_of(name):
        with_it += [other for other in others if _STATE.fullmatch(other)]
    if not with_it:
        return ""
    return f"it belongs together with {with_it[0]} beside it; put what belongs together into a folder of its own"


# Their step, epoch and scores


@attrs.frozen(kw_only=True)
class Said:
    """The step, epoch and scores in a file or folder."""

    name: str
    step: int | None = None
    """None if it is not there."""
    epoch: int | None = None
    """None if it is not there."""
    epoch_end: bool = True
    number: int | None = None
    """The only number of its name, if that may be its step."""
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    format: str = "torch"
    contents: Contents = "full"
    is_export: bool = False
    """Whether it is a folder of a model alone, as ``trainer.save_model()`` writes it."""
    writer: str = "a trainer"
    """``Lightning``, ``the HF Trainer``, ``torch.save`` or ``a trainer``."""


def read_file(storage: Storage, name: str) -> Said:
    """Return step, epoch and scores of a file; raise `CorruptError` if it is not a checkpoint."""
    with open_contents(storage, name) as contents:
        if "pytorch-lightning_version" in contents.others or "loops" in _tops(contents):
            return _lightning(name, location(storage, name), contents)
        return _bare(name, contents)


def read_folder(storage: Storage, name: str) -> Said:
    """Return step, epoch and scores of a folder; raise `CorruptError` if the HF Trainer's state is unreadable."""
    files = [path[len(name) + 1 :] for path in storage.list(name)]
    if _HF_STATE in files:
        return _hugging_face(storage, name, files)
    in_name = numbers_in(name)
    inside = [path for path in files if path.endswith(SUFFIXES)]
    said = Said(name=name)
    if "CKPT.yaml" in files:
        said = _speechbrain(storage, name, files)
    elif len(inside) == 1 and ".metadata" not in files:
        said = read_file(storage, f"{name}/{inside[0]}")
    # A DCP folder and DeepSpeed's hold an optimizer too, under names that do not say so.
    is_full = any("optim" in path or path.endswith((".distcp", "model_states.pt")) for path in files)
    is_full |= bool(inside) and said.contents == "full" and said.writer != "a trainer"
    step, epoch = (_first(in_name, names) for names in (_STEPS, _EPOCHS))
    return attrs.evolve(
        said,
        name=name,
        step=said.step if step is None else step,
        epoch=said.epoch if epoch is None else epoch,
        number=None,
        format="dcp" if ".metadata" in files else "folder",
        contents="full" if is_full else "weights",
        is_export=not is_full and _is_export(files),
        writer="a trainer",
    )


def _is_export(files: Iterable[str]) -> bool:
    tops = [path for path in files if "/" not in path]
    has_weights = any(_EXPORT.fullmatch(path) or _SHARD.fullmatch(path) for path in tops)
    return has_weights and any(_EXPORTED.fullmatch(path) or path == "training_args.bin" for path in tops)


def _speechbrain(storage: Storage, name: str, files: Collection[str]) -> Said:
    """Return what is in the text files of SpeechBrain: the scores, and the count of finished epochs."""
    with storage.open(f"{name}/CKPT.yaml") as stream:
        text = stream.read(MAX_STATE_BYTES).decode(errors="replace")
    lines = dict(re.findall(r"^([A-Za-z][\w./-]*): (\S+)$", text, re.MULTILINE))
    ends, epochs = lines.pop("end-of-epoch", "") == "true", 0
    if "counter.ckpt" in files:
        with storage.open(f"{name}/counter.ckpt") as stream:
            counted = stream.read(_EXPONENT * 4)
        epochs = int(counted) if counted.strip().isdigit() else 0
    scores: dict[str, float] = {}
    for key, value in lines.items():
        with contextlib.suppress(ValueError):
            scores[key] = float(value)
    metrics = {key: number for key, number in scores.items() if key not in (*_BESIDE, "unixtime")}
    return Said(
        name=name,
        step=_first(scores, _STEPS),
        epoch=epochs - 1 if epochs else None,
        epoch_end=ends,
        metrics=metrics,
    )


# Lightning


def _lightning(name: str, place: str, contents: Tensors) -> Said:
    step, epoch = (_counter(contents.others.get(key), key) for key in ("global_step", "epoch"))
    processed = contents.others.get("loops.fit_loop.epoch_progress.current.processed")
    return Said(
        name=name,
        step=step,
        epoch=epoch,
        epoch_end=processed > epoch if type(processed) is int else True,
        metrics=_lightning_scores(name, place, contents),
        contents="full" if any(top.startswith("optim") for top in _tops(contents)) else "weights",
        writer="Lightning",
    )


def _lightning_scores(name: str, place: str, contents: Tensors) -> dict[str, float]:
    """Return the scores in the file's name, and those of each callback whose best checkpoints name this very file."""
    texts = _with_monitors(texts_in(name), name, contents)
    scores = {key: float(text) for key, text in texts.items() if key not in ("epoch", "step")}
    found: defaultdict[int, list[tuple[str, str, float]]] = defaultdict(list)
    for key, monitor in contents.others.items():
        callback, _, field = key.rpartition(".")
        if field != "monitor" or not callback.startswith("callbacks.") or not isinstance(monitor, str):
            continue
        for path, key_of_score in _best_paths(contents, callback):
            score = _number(contents, key_of_score)
            if score is not None:
                found[_common(path, place)].append((path, monitor, score))
    # The directory may have been moved, so the path that agrees furthest is meant, if it has the file's name at all.
    furthest = max(found, default=0)
    nearest = found[furthest] if furthest else []
    # If two callbacks have a file of this name, either may have written this one.
    for _, monitor, score in nearest if len({path for path, *_ in nearest}) == 1 else ():
        # The name is the file's own. A callback may only give the digits that the name has rounded away.
        if monitor not in texts or _is_rounded(score, texts[monitor]):
            scores[monitor] = score
    return scores


def _with_monitors(texts: Mapping[str, str], name: str, contents: Tensors) -> dict[str, str]:
    """Return the texts in a name. A monitor with a slash has made a folder: ``val/acc=0.5.ckpt``."""
    monitors = [value for key, value in contents.others.items() if key.endswith(".monitor") and isinstance(value, str)]
    named = {
        key: monitor for key in texts for monitor in monitors if monitor.endswith(f"/{key}") and f"{monitor}=" in name
    }
    return {named.get(key, key): text for key, text in texts.items()}


def _best_paths(contents: Tensors, callback: str) -> Iterator[tuple[str, str]]:
    """Yield the paths that a callback has a score for, and the key of the score."""
    best = f"{callback}.best_k_models."
    for key in (*contents.tensors, *contents.others):
        if key.startswith(best):
            yield key[len(best) :], key
    path = contents.others.get(f"{callback}.best_model_path")
    if isinstance(path, str) and path:
        yield path, f"{callback}.best_model_score"


def _counter(value: Any, key: str) -> int:
    """Return a count of steps or epochs; raise if it is not one."""
    number = as_number(value)
    if number is None or not 0 <= number < MAX_COUNT or not number.is_integer():
        msg = f"its {key} is {brief(value)}; expected a whole number of at least 0, and below 2**63"
        raise CorruptError(msg)
    return int(value)


def _common(one: str, other: str) -> int:
    """Return how many folders two paths have in common from their ends on, the file's own name included."""
    ends = (reversed(re.split(r"[/\\]+", path[-_MAX_PATH:])) for path in (one, other))
    return sum(takewhile(bool, map(operator.eq, *ends)))


def _number(contents: Tensors, key: str) -> float | None:
    if key in contents.tensors:
        is_real = contents.tensors[key].numel == 1 and not contents.tensors[key].dtype.startswith("complex")
        return float(contents.read(key)) if is_real else None
    return as_number(contents.others.get(key))


def _is_rounded(score: float, text: str) -> bool:
    """Return whether ``text`` is the score with fewer digits."""
    mantissa, _, exponent = text.lower().partition("e")
    # An exponent with more digits is 0 or infinite.
    decimals = len(mantissa.partition(".")[2]) - int(exponent[:_EXPONENT] or 0)
    return abs(score - float(text)) <= 0.5000001 * 10.0 ** -max(decimals, -_MAX_EXPONENT)


# The Hugging Face Trainer


def _hugging_face(storage: Storage, name: str, files: Sequence[str]) -> Said:
    with reading(f"its {_HF_STATE}"):
        with storage.open(f"{name}/{_HF_STATE}") as stream:
            state = json.loads(stream.read(MAX_STATE_BYTES))
        step, epoch = _counter(state["global_step"], "global_step"), as_number(state.get("epoch") or 0)
        if epoch is None or not 0 <= epoch < MAX_COUNT:
            msg = f"its epoch is {brief(state['epoch'])}; expected a number of at least 0, and below 2**63"
            raise CorruptError(msg)
    history = state.get("log_history")
    metrics = {
        key: number
        for entry in (history if isinstance(history, list) else ())
        if isinstance(entry, dict) and entry.get("step") == step
        for key, value in entry.items()
        if key not in ("step", "epoch") and not NO_SCORE.fullmatch(key) and (number := as_number(value)) is not None
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
    in_name = numbers_in(name)
    numbers = _numbers(contents)
    step, epoch, in_epoch = (_first(numbers, names) for names in (_STEPS, _EPOCHS, ("epoch_length",)))
    ends, number = True, only_number_in(name)
    if step and in_epoch and epoch is None:  # ignite counts iterations, and knows how many an epoch has.
        epoch, ends = (step - 1) // in_epoch, step % in_epoch == 0
    elif epoch and "meta.epoch" in numbers:  # At an epoch's end mmengine writes how many are finished.
        ends = _first(in_name, _EPOCHS) == epoch
        epoch -= ends
    elif _tops(contents) == {"model", "opt"}:  # fastai numbers its files by epochs.
        epoch = number
    texts = texts_in(name)
    scores = {key: float(text) for key, text in texts.items()}
    for key, value in numbers.items():
        # The best score so far is another checkpoint's.
        if "." not in key and "best" not in key.lower() and (key not in texts or _is_rounded(value, texts[key])):
            scores[key] = value
    is_torch = not isinstance(contents, SafetensorsContents)
    return Said(
        name=name,
        step=_first(in_name, _STEPS) if step is None else step,
        epoch=_first(in_name, _EPOCHS) if epoch is None else epoch,
        epoch_end=ends,
        number=None if number == epoch else number,
        metrics={key: value for key, value in scores.items() if key not in _BESIDE},
        format="torch" if is_torch else "safetensors",
        contents="full" if is_torch and any(top == "opt" or "optim" in top for top in _tops(contents)) else "weights",
        writer="torch.save",
    )


def _tops(contents: Tensors) -> set[str]:
    return {key.partition(".")[0] for key in (*contents.tensors, *contents.others)}


def _numbers(contents: Tensors) -> dict[str, float]:
    """Return the numbers at the top of a saved dict, in a dict of metrics, and under `_HOLDERS`; scalar tensors too."""
    numbers: dict[str, float] = {}
    for key in (*contents.others, *contents.tensors):
        name = next((key[len(at) :] for at in _METRICS if key.startswith(at)), key)
        # A plain state_dict may have weights that are scalars: it has no numbers beside them.
        is_scalar = key in contents.others or (contents.others and not contents.tensors[key].shape)
        if key.startswith(_HOLDERS) or (is_scalar and "." not in name):
            value = _number(contents, key)
            numbers |= {} if value is None else {name: value}
    return numbers


def _first(numbers: Mapping[str, float], names: Sequence[str]) -> int | None:
    """Return the first counter of these names: a whole number, at the top or under `_HOLDERS`."""
    values = (numbers.get(f"{holder}{name}", math.nan) for holder in ("", *_HOLDERS) for name in names)
    return next((int(value) for value in values if 0 <= value < MAX_COUNT and float(value).is_integer()), None)
