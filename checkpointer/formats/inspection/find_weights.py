"""Finds which tensors of a payload are the model, under which names, for all commands and `load_weights`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import attrs

from checkpointer._display import some_of
from checkpointer.errors import MismatchError, RestoreError
from checkpointer.formats.inspection.tensors import Part, TensorInfo, Tensors

_MODELS: Final = frozenset(
    {"model", "state_dict", "model_state_dict", "model_state", "module", "weights", "net", "network"}
)
"""The keys under which trainers keep the weights of the model."""
_BESIDE: Final = (
    *("optim", "sched", "lr_sched", "rng", "random", "loops", "callbacks"),
    *("scaler", "sampler", "dataloader"),
)
"""Keys that begin so hold something else than weights."""
_OPTIONAL: Final = "num_batches_tracked"
"""Batch normalisation had no such counter before torch 0.4.1; torch itself loads weights without it."""
WRAPPERS: Final = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Names that only wrappers, such as ``torch.compile``, give to the module within them."""
_SHOWN: Final = 6
_NOTHING: Final = "it holds no weights: there is no mapping of names to tensors in it, and no module"

Shape = tuple[int, ...] | None
Wanted = Sequence[Mapping[str, Shape]]
"""The tensors of a module: each by its name, or by all its names, with its shape (None: any)."""


@attrs.frozen(kw_only=True)
class Weights:
    """Tensors by name, and how to get each."""

    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], Any]
    """Returns one by its name."""
    prefix: str = ""
    """The part of the payload that they are of; empty for all of it."""
    values: Mapping[str, Any] = MappingProxyType({})
    """Values of a ``state_dict`` beside tensors, such as ``_extra_state``; None for an object that is not unpickled."""
    versions: Mapping[str, Any] = MappingProxyType({})
    """The ``_metadata`` of a ``state_dict``."""


def weights_of(contents: Tensors, part: str | None = None) -> Weights:
    """Return the weights of a payload, under the names that the model knows them by.

    Args:
        contents: The payload, from `checkpointer.formats.inspection.payload.open_contents`.
        part: Where they are, such as ``"model"``, ``"state_dict.encoder"``, or a file of a folder; ``""`` takes every
            tensor. None finds them: they are the only set of weights, or the only one under a usual name
            (``model``, ``state_dict``, ...) of which no other is a copy.

    Raises:
        RestoreError: If there is no such part; or if several may be meant, which are named.

    Example:
        >>> import io, torch
        >>> from checkpointer.formats.inspection.torch_file import open_torch
        >>> stream = io.BytesIO()
        >>> torch.save({"model": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(2)}}, stream)
        >>> weights = weights_of(open_torch(stream))
        >>> weights.prefix, list(weights.tensors)
        ('model', ['w'])
    """
    if part is None:
        part = _found(contents)
    return _weights(contents, _below(contents, part), part)


def _weights(contents: Tensors, part: Part, prefix: str) -> Weights:
    tensors = {name: attrs.evolve(contents.tensors[full], name=name) for name, full in part.names.items()}
    return Weights(
        tensors=tensors,
        read=lambda name: contents.read(part.names[name]),
        prefix=prefix,
        values={name: contents.value(full) for name, full in part.values.items()},
        versions=part.versions,
    )


def _below(contents: Tensors, path: str) -> Part:
    """Return the part at a path, or what is beneath it."""
    if path in contents.parts and (path or len(contents.parts) == 1):
        return contents.parts[path]
    if not path:
        return Part(names={name: name for name in contents.tensors})
    starts = (f"{path}.", f"{path}: ")
    full = {
        f"{at}.{name}" if at else name: own for at, part in contents.parts.items() for name, own in part.names.items()
    }
    for names in (full, {name: name for name in contents.tensors}):
        below = {name[len(s) :]: own for name, own in names.items() for s in starts if name.startswith(s)}
        if below:
            return Part(names=below)
    have = _listed(contents, contents.parts) if contents.parts else "no weights"
    msg = f"there is no tensor under {path!r}; the payload has {have}"
    raise RestoreError(msg)


# Without a module that takes them


def _candidates(contents: Tensors) -> dict[str, Part]:
    """Return the parts that may be a model's: not what is beside one, nor single numbers, unless there is no other."""

    def is_likely(path: str, part: Part) -> bool:
        is_beside = any(key.startswith(_BESIDE) for key in re.split(r": |[./]", path.lower()))
        return not is_beside and any(contents.tensors[full].numel > 1 for full in part.names.values())

    parts = contents.models
    return {path: part for path, part in parts.items() if is_likely(path, part)} or dict(parts)


def _found(contents: Tensors) -> str:
    """Return the path of the model's weights; raise if there is none, or more than one."""
    candidates = _candidates(contents)
    usual = [path for path in candidates if path.rpartition(".")[2] in _MODELS]
    tops = {path.partition(".")[0] for path in candidates}
    if len(candidates) == 1:
        path = next(iter(candidates))
    elif len(usual) == 1 and not _copies(contents, candidates, usual[0]):
        path = usual[0]
    elif len(tops) == 1 and tops <= _MODELS:
        return tops.pop()
    elif not candidates:
        raise RestoreError(_NOTHING)
    else:
        raise MismatchError(_which(contents, candidates))
    if not path:
        # A file of weights alone may hold several modules, each under its name.
        inside = _inside(contents.parts[path])
        for top in _MODELS & inside.keys():
            copies = _copies(contents, inside, top)
            if copies:
                raise MismatchError(_which(contents, [top, *copies, path]))
    return path


def _inside(part: Part) -> dict[str, Part]:
    """Return what is under each first key of the names in a part: several modules may be one flat mapping."""
    inside: dict[str, dict[str, str]] = {}
    for name, full in part.names.items():
        top, _, rest = name.partition(".")
        if rest:
            inside.setdefault(top, {})[rest] = full
    return {top: Part(names=names) for top, names in inside.items()}


def _copies(contents: Tensors, parts: Mapping[str, Part], path: str) -> list[str]:
    """Return which other parts have all that one has, such as its average does."""
    own = _shapes(contents, parts[path])

    def has_all(part: Part) -> bool:
        there = {name.removeprefix("module."): shape for name, shape in _shapes(contents, part).items()}
        return all(_same(there, name.removeprefix("module."), shape) for name, shape in own.items())

    return [other for other, part in parts.items() if other != path and has_all(part)]


def _which(contents: Tensors, paths: Iterable[str]) -> str:
    paths = list(paths)
    return (
        f"several sets of weights may be meant: {_listed(contents, paths)}; choose one: part={paths[0]!r} "
        f"(on the command line --only {shlex.quote(paths[0])})"
    )


def _listed(contents: Tensors, paths: Iterable[str]) -> str:
    counts = {path: len(contents.parts[path].names) if path in contents.parts else 0 for path in paths}
    texts = [f"{path or repr('')} ({count} tensors)" if count else path for path, count in counts.items()]
    return some_of(texts, _SHOWN)


# For a module that takes them


def weights_for(
    contents: Tensors,
    wanted: Wanted,
    part: str | None = None,
    *,
    rename: Callable[[str], str | None] = lambda name: name,
) -> Weights:
    """Return the weights that fit a module, by names and shapes, under the module's names.

    A prefix that all of them have in common is taken off, and so are the names of `WRAPPERS`. If nothing fits as a
    whole, what fits best is returned.

    Args:
        contents: The payload.
        wanted: What the module has, without the names of `WRAPPERS`.
        part: As for `weights_of`; the whole of the module's weights is looked for in it.
        rename: Turns a name in the payload into one of the module; None leaves it out.

    Raises:
        MismatchError: If several sets of weights fit, which are named.
        RestoreError: If there is no such part.

    Example:
        >>> import io, torch
        >>> from checkpointer.formats.inspection.torch_file import open_torch
        >>> stream = io.BytesIO()
        >>> torch.save({"net": {"head.w": torch.ones(2), "body.w": torch.ones(3)}}, stream)
        >>> weights_for(open_torch(stream), [{"w": (3,)}]).prefix
        'net.body'
    """
    parts = _candidates(contents) if part is None else {part: _below(contents, part)}
    renamed = {path: _renamed(found, rename) for path, found in parts.items()}
    fits = [
        (path, prefix, is_whole)
        for path, found in renamed.items()
        for prefix, is_whole in _fits(wanted, _shapes(contents, found))
    ]
    # If a set holds the tensors of the module and no others, it is preferred to sets that hold more.
    best = [fit for fit in fits if fit[2]] or fits
    if len(best) > 1:
        raise MismatchError(_which(contents, [_path(path, prefix) for path, prefix, _ in best]))
    if not best:
        best = _closest(contents, wanted, renamed)
    if not best:
        raise MismatchError(_NOTHING)
    path, prefix, _ = best[0]
    return _weights(contents, _stripped(renamed[path], prefix), _path(path, prefix))


def _path(path: str, prefix: str) -> str:
    return ".".join(filter(None, (path, prefix.rstrip("."))))


def _renamed(part: Part, rename: Callable[[str], str | None]) -> Part:
    names: dict[str, str] = {}
    renamed = {key: rename(key) for key in part.names}
    for key, to in renamed.items():
        name = None if to is None else unwrapped(to)
        if name in names:
            msg = f"{key!r} and another name become {name!r}, by key_map= or without the name of a wrapper"
            raise MismatchError(msg)
        if name is not None:
            names[name] = part.names[key]
    is_same = all(key == to for key, to in renamed.items())
    versions = {unwrapped(path): version for path, version in part.versions.items()} if is_same else {}
    return attrs.evolve(part, names=names, versions=versions)


def unwrapped(name: str) -> str:
    """Return a name in a ``state_dict``, or the path of a module, without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _stripped(part: Part, prefix: str) -> Part:
    def strip(names: Mapping[str, Any]) -> dict[str, Any]:
        return {name[len(prefix) :]: value for name, value in names.items() if name.startswith(prefix)}

    if not prefix:
        return part
    # The version of the module itself has the module's path as its name.
    versions = strip({f"{path}." if f"{path}." == prefix else path: v for path, v in part.versions.items()})
    return Part(names=strip(part.names), values=strip(part.values), versions=versions)


def _shapes(contents: Tensors, part: Part) -> dict[str, Shape]:
    return {name: contents.tensors[full].shape for name, full in part.names.items()}


def _fits(wanted: Wanted, there: Mapping[str, Shape]) -> Iterator[tuple[str, bool]]:
    """Yield each prefix under which all that is wanted is there, and whether nothing else is."""
    needed = [names for names in wanted if not all(name.endswith(_OPTIONAL) for name in names)]
    if not needed:
        return
    rarest = max(needed, key=lambda names: max(map(len, names)))
    for prefix in _prefixes(rarest, there):
        if all(any(_same(there, f"{prefix}{name}", shape) for name, shape in names.items()) for names in needed):
            own = {f"{prefix}{name}" for names in wanted for name in names}
            yield prefix, all(name in own for name in there if name.startswith(prefix))


def _prefixes(names: Iterable[str], there: Iterable[str]) -> list[str]:
    """Return what stands before one of the names, in the order of the payload."""
    ends = [*names]
    found = (key.removesuffix(end) for key in there for end in ends if key == end or key.endswith(f".{end}"))
    return [*dict.fromkeys(found)]


def _same(there: Mapping[str, Shape], name: str, shape: Shape) -> bool:
    return name in there and (shape is None or there[name] == shape)


def _closest(contents: Tensors, wanted: Wanted, parts: Mapping[str, Part]) -> list[tuple[str, str, bool]]:
    """Return the part and prefix under which most is found, by shape and then by name."""
    own = {name: shape for names in wanted for name, shape in names.items()}
    names = [*own]
    some = {names[0], names[len(names) // 2], names[-1]} if names else set()
    found = []
    for path, part in parts.items():
        there = _shapes(contents, part)
        for prefix in dict.fromkeys(["", *_prefixes(some, there)]):
            shaped = sum(_same(there, f"{prefix}{name}", shape) for name, shape in own.items())
            named = sum(f"{prefix}{name}" in there for name in own)
            found.append((shaped, named, path.rpartition(".")[2] in _MODELS, (path, prefix, False)))
    return [max(found, key=lambda item: item[:3])[3]] if found else []
