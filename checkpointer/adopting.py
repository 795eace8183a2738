"""Makes records of checkpoints that others wrote: Lightning, the Hugging Face Trainer, or a bare ``torch.save``."""

from __future__ import annotations

import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import attrs

from checkpointer.errors import CheckpointerError, CorruptError
from checkpointer.formats.contents import open_contents
from checkpointer.formats.tensors import Tensors
from checkpointer.index import HOME
from checkpointer.inspecting import Catalog
from checkpointer.ports import Storage, SupportsPaths, SupportsSweep
from checkpointer.records import Contents, Record
from checkpointer.transaction import Transaction

__all__ = ["Adoption", "Found", "adopt", "find_foreign"]

MAX_STATE_BYTES: Final = 1 << 26
_SUFFIXES: Final = (".ckpt", ".pt", ".pth", ".safetensors")
_HF_FOLDER: Final = re.compile(r"(?:.*/)?checkpoint-(\d+)")
_HF_STATE: Final = "trainer_state.json"
_STEPS: Final = ("global_step", "step", "steps", "num_steps", "iteration", "iter", "n_iter")
_EPOCHS: Final = ("epoch", "epochs", "current_epoch")
_BESIDE: Final = (*_STEPS, *_EPOCHS, "seed", "version", "batch_size", "num_epochs", "max_epochs", "total_flos", "time")
_PAIR: Final = re.compile(r"(?:^|[-/])([A-Za-z][\w. ]*)=(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?=-|$)")


@attrs.frozen(kw_only=True)
class Found:
    """What a file or folder says of itself."""

    name: str
    step: int
    epoch: int = 0
    epoch_end: bool = True
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    format: str = "torch"
    contents: Contents = "full"
    writer: str
    """Who wrote it: ``Lightning``, ``the HF Trainer`` or ``torch.save``, and from where the step is known."""


@attrs.frozen(kw_only=True)
class Adoption:
    """What can be made records of, and what cannot."""

    found: tuple[Found, ...]
    """In the order of their steps."""
    refused: Mapping[str, str]
    """Files and folders that stay as they are, each with the reason."""


def find_foreign(catalog: Catalog, steps: Mapping[str, int] | None = None) -> Adoption:
    """Look at what no record names, and find step, epoch and scores in it. Nothing is unpickled, and nothing changed.

    Lightning: ``global_step``, ``epoch`` and the scores that its ``ModelCheckpoint`` keeps in the file. The HF Trainer:
    ``trainer_state.json`` of each ``checkpoint-N``, with what was logged at that step. Anything else: numbers at the
    top of the saved dict, and ``name=value`` in the file's name. Where only an epoch is known, the step counts epochs.

    Args:
        catalog: The directory, from `checkpointer.inspecting.look_at`.
        steps: Steps by name, for files that do not say theirs.

    Example:
        >>> from checkpointer.inspecting import look_at
        >>> from checkpointer.testing import MemoryStorage
        >>> find_foreign(look_at(MemoryStorage())).found
        ()
    """
    found: list[Found] = []
    refused: dict[str, str] = {}
    for name in _candidates(catalog):
        try:
            item = _read(catalog.storage, name, (steps or {}).get(name))
        except (CheckpointerError, OSError) as error:
            refused[name] = str(error).removeprefix(f"{name}: ")
            continue
        found.append(item)
    found.sort(key=lambda item: (item.step, item.name))
    for item in [item for item in found if item.name.rpartition("/")[2].startswith("last")]:
        there = {record.step: record.name for record in catalog.records}
        there |= {other.step: other.name for other in found if other is not item}
        twin = there.get(item.step)
        if twin is not None:
            refused[item.name] = f"it is of the same step as {twin}, so it is a copy that is called last"
            found.remove(item)
    return Adoption(found=tuple(found), refused=refused)


def _candidates(catalog: Catalog) -> Iterator[str]:
    """Yield what may be a checkpoint and has no record: files by their extension, folders by the HF Trainer's name."""
    names = {record.name for record in catalog.records} | set(catalog.aliases)
    names |= {entry.record.name for entry in catalog.unfinished}
    folders = {match[0] for path in catalog.files if (match := _HF_FOLDER.fullmatch(path.rpartition("/")[0]))}
    yield from sorted(folders - names)
    for path in sorted(catalog.files):
        is_inside = any(path.startswith(f"{folder}/") for folder in (*folders, *names, HOME))
        if not is_inside and path not in names and path.endswith(_SUFFIXES):
            yield path


def _read(storage: Storage, name: str, step: int | None) -> Found:
    if isinstance(storage, SupportsPaths) and os.path.islink(storage.local_path(name)):
        msg = "it is a link to another file; an alias is made when a manager saves"
        raise CorruptError(msg)
    if _HF_FOLDER.fullmatch(name):
        return _hugging_face(storage, name)
    with open_contents(storage, name) as contents:
        if "pytorch-lightning_version" in contents.others or "loops" in _tops(contents):
            return _lightning(name, contents)
        return _bare(name, contents, step)


# Lightning


def _lightning(name: str, contents: Tensors) -> Found:
    step, epoch = contents.others.get("global_step"), contents.others.get("epoch")
    if not isinstance(step, int) or not isinstance(epoch, int):
        msg = "Lightning wrote it, but it has no global_step or epoch"
        raise CorruptError(msg)
    processed = contents.others.get("loops.fit_loop.epoch_progress.current.processed")
    return Found(
        name=name,
        step=step,
        epoch=epoch,
        epoch_end=processed > epoch if isinstance(processed, int) else True,
        metrics=_lightning_scores(name, contents),
        contents="full" if any(top.startswith("optim") for top in _tops(contents)) else "weights",
        writer="Lightning",
    )


def _lightning_scores(name: str, contents: Tensors) -> dict[str, float]:
    """Return the scores of this very file that its callbacks keep in it, and those that its name says."""
    scores = _from_name(name)
    for key, monitor in contents.others.items():
        callback, _, field = key.rpartition(".")
        if field != "monitor" or not callback.startswith("callbacks.ModelCheckpoint") or not isinstance(monitor, str):
            continue
        best = [key for key in contents.tensors if key.startswith(f"{callback}.best_k_models.")]
        mine = [key for key in best if key.endswith(f"/{name.rpartition('/')[2]}")]
        # What is being saved is the current score, unless the file was saved for another reason.
        for key in (*mine, *([f"{callback}.current_score"] if not mine else ())):
            if key in contents.tensors and contents.tensors[key].numel == 1:
                scores[monitor] = float(contents.read(key))
    return {key: value for key, value in scores.items() if key not in ("epoch", "step")}


# The Hugging Face Trainer


def _hugging_face(storage: Storage, name: str) -> Found:
    try:
        with storage.open(f"{name}/{_HF_STATE}") as stream:
            state = json.loads(stream.read(MAX_STATE_BYTES))
        step, epoch = int(state["global_step"]), float(state.get("epoch") or 0)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        msg = f"its {_HF_STATE} cannot be read ({type(error).__name__}: {error})"
        raise CorruptError(msg) from error
    except FileNotFoundError as error:
        msg = f"it has no {_HF_STATE}, so the HF Trainer did not write it"
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
    return Found(
        name=name,
        step=step,
        epoch=max(int(epoch) - ended, 0),
        epoch_end=ended,
        metrics=metrics,
        format="folder",
        contents="full" if storage.list(f"{name}/optimizer.pt") or storage.list(f"{name}/optimizer.bin") else "weights",
        writer="the HF Trainer",
    )


# Anything else


def _bare(name: str, contents: Tensors, step: int | None) -> Found:
    if not contents.tensors:
        msg = "there is no tensor in it, so it is no checkpoint"
        raise CorruptError(msg)
    in_name = _from_name(name)
    numbers = dict(_numbers(contents))
    epoch = _first(numbers, _EPOCHS)
    epoch = _first(in_name, _EPOCHS) if epoch is None else epoch
    known = step if step is not None else _first(numbers, _STEPS)
    known = _first(in_name, _STEPS) if known is None else known
    writer = "torch.save"
    if known is None and epoch is not None:
        known, writer = epoch + 1, "torch.save; it knows its epoch only, so that steps count epochs"
    if known is None:
        msg = "it says no step and no epoch, in it or in its name; pass its step: --step NAME=STEP"
        raise CorruptError(msg)
    scores = {key: value for key, value in {**in_name, **numbers}.items() if key not in _BESIDE}
    is_torch = not name.endswith(".safetensors")
    return Found(
        name=name,
        step=known,
        epoch=epoch or 0,
        metrics=scores,
        format="torch" if is_torch else "safetensors",
        contents="full" if is_torch and any("optim" in top for top in _tops(contents)) else "weights",
        writer=writer,
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


def _first(numbers: Mapping[str, float], names: Sequence[str]) -> int | None:
    for name in names:
        value = numbers.get(name)
        if value is not None and math.isfinite(value) and value >= 0 and float(value).is_integer():
            return int(value)
    return None


def _from_name(name: str) -> dict[str, float]:
    """Return what a file name says as ``name=value``, and ``epoch`` or ``step`` with a number after it.

    The only place where a name is believed: nobody else told these files' steps.
    """
    stem = re.sub(r"\.(ckpt|pt|pth|safetensors)$", "", name.rpartition("/")[2])
    stem = re.sub(r"-v\d+$", "", stem)
    found = {key: float(value) for key, value in _PAIR.findall(stem)}
    for word in ("epoch", "step", "iter"):
        match = re.search(rf"(?:^|[^A-Za-z]){word}[-_]?(\d+)(?:$|[^\d.])", stem)
        if match and word not in found:
            found[word] = float(match[1])
    return found


# Making records


def adopt(
    catalog: Catalog, adoption: Adoption, transaction: Transaction, *, run: str | None = None
) -> Iterator[Record]:
    """Make a record of each, oldest step first: its digest is taken, its payload stays where and as it is.

    Args:
        catalog: The directory, as it was looked at.
        adoption: What `find_foreign` found.
        transaction: Writes to the same storage.
        run: Id of the run that they become part of; None makes a new one.

    Yields:
        Each record, once it is there.

    Example:
        >>> import io, torch
        >>> from checkpointer.inspecting import look_at
        >>> from checkpointer.testing import MemoryStorage
        >>> storage, stream = MemoryStorage(), io.BytesIO()
        >>> torch.save({"model": {"w": torch.ones(1)}, "step": 7, "val_loss": 0.5}, stream)
        >>> storage.write("a.pt", stream.getvalue())
        >>> catalog = look_at(storage)
        >>> (record,) = adopt(catalog, find_foreign(catalog), Transaction(storage, "me"))
        >>> record.step, dict(record.metrics)
        (7, {'val_loss': 0.5})
    """
    if isinstance(transaction.storage, SupportsSweep):
        transaction.storage.prepare()
    run = run or uuid.uuid4().hex[:12]
    serial = 1 + max((record.serial for record in catalog.records), default=0)
    line = next((record.line for record in reversed(catalog.records) if record.run == run), ())
    for number, item in enumerate(adoption.found):
        draft = Record(
            name=item.name,
            step=item.step,
            epoch=item.epoch,
            epoch_end=item.epoch_end,
            metrics=item.metrics,
            time=_time(catalog, item.name),
            size=0,
            digest="",
            format=item.format,
            contents=item.contents,
            reason=f"adopted: written by {item.writer}",
            run=run,
            line=line,
            serial=serial + number,
            token=uuid.uuid4().hex,
        )
        yield transaction.adopt(draft)


def _time(catalog: Catalog, name: str) -> float:
    """Return when the payload was last written, as far as the storage says, else now."""
    storage = catalog.storage
    if isinstance(storage, SupportsPaths):
        return os.stat(storage.local_path(name)).st_mtime
    stat = catalog.files.get(name)
    return stat.modified_s if stat is not None and stat.modified_s is not None else time.time()
