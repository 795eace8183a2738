"""Which files that no record names may be adopted: each alone, or a whole folder where several belong together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable
from typing import Final

import attrs

from checkpointer.commit.index import HOME, directories_below

__all__ = ["COPIES", "SUFFIXES", "Units", "find_units", "parts_of"]

SUFFIXES: Final = (".ckpt", ".pt", ".pth", ".safetensors")
"""Extensions of files that may be a checkpoint by themselves."""
COPIES: Final = frozenset({"best", "last", "latest", "newest", "final", "current"})
"""Parts of file names that call a file a copy of another checkpoint."""
_IN_FOLDERS: Final = (*SUFFIXES, ".bin", ".distcp", "/trainer_state.json")
"""What makes a folder one that may be a checkpoint."""
_NAMED: Final = re.compile(
    r"(?:(?:checkpoint|ckpt|global_?step|step|epoch|iteration|iter|ep|ba)[-_+=]?\d+[-_+=]?)+"
    r"|CKPT\+.*|.*\.(?:ckpt|pt|pth|dcp)",
    re.IGNORECASE,
)
"""The name of a folder that is one checkpoint: accelerate's, DeepSpeed's, speechbrain's, Lightning's."""
_SHARD: Final = re.compile(r".*-\d+-of-\d+\.\w+")
_EXPORT: Final = re.compile(r"(?:model|pytorch_model|adapter_model|diffusion_pytorch_model|consolidated[\w.]*)\.\w+")
_EXPORTED: Final = re.compile(r"(?:config|adapter_config|model_index)\.json|.*\.index\.json")
_STATE: Final = re.compile(
    r"(?:optim\w*|(?:lr_?)?sched\w*|scaler|random_states?\w*|rng\w*|criterion|counter|brain)"
    r"\.(?:bin|pt|pth|ckpt|pkl|safetensors)|CKPT\.yaml|trainer_state\.json|training_args\.bin"
)
_LETTERS: Final = re.compile(r"[A-Za-z]+")


@attrs.frozen(kw_only=True)
class Units:
    """What may be adopted, and what may not."""

    files: tuple[str, ...]
    """Files that may be a checkpoint each."""
    folders: tuple[str, ...]
    """Folders that may be a checkpoint each, as a whole."""
    left: dict[str, str]
    """Files that may not be adopted, each with the reason."""


def find_units(files: Iterable[str], taken: Container[str] = frozenset()) -> Units:
    """Sort the files of a directory into units. What lies in a directory with records of its own is left out.

    Args:
        files: Every path in the directory.
        taken: Names that records or aliases have already.

    Example:
        >>> found = find_units(["a.pt", "checkpoint_4/model.pt", "run/.checkpointer/index.json", "run/b.pt"])
        >>> found.files, found.folders
        (('a.pt',), ('checkpoint_4',))
    """
    paths = sorted(files)
    below = frozenset(directories_below(paths))
    beside: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder, _, name = path.rpartition("/")
        beside[folder].add(name)
    units: dict[str, None] = {}
    alone: list[str] = []
    left: dict[str, str] = {}
    for path in paths:
        above = [path[:i] for i, char in enumerate(path) if char == "/"]
        is_taken = path in taken or any(folder in taken or folder in below for folder in above)
        if is_taken or path.startswith(f"{HOME}/") or not path.endswith(_IN_FOLDERS):
            continue
        folder, _, name = path.rpartition("/")
        unit = next((above_it for above_it in above if _is_unit(above_it, beside[above_it])), None)
        reason = _belongs(name, beside[folder]) if unit is None else ""
        if unit is not None or (reason and folder):
            units[unit or folder] = None
        elif path.endswith(SUFFIXES) and reason:
            left[path] = reason
        elif path.endswith(SUFFIXES):
            alone.append(path)
    return Units(files=tuple(alone), folders=tuple(units), left=left)


def _is_unit(folder: str, inside: Container[str]) -> bool:
    return bool(_NAMED.fullmatch(folder.rpartition("/")[2])) or ".metadata" in inside


def _belongs(name: str, beside: Iterable[str]) -> str:
    """Return why a file is one part of several; empty if it is not."""
    if _SHARD.fullmatch(name):
        return "it is one of several shards, and one record names one file or one folder; put them into a folder"
    others = sorted(other for other in beside if other != name)
    with_it = [other for other in others if _EXPORTED.fullmatch(other)] if _EXPORT.fullmatch(name) else []
    if _STATE.fullmatch(name):
        with_it = others
    elif not any(char.isdigit() for char in name) and not parts_of(name) & COPIES:
        with_it += [other for other in others if _STATE.fullmatch(other)]
    if not with_it:
        return ""
    return f"it belongs together with {with_it[0]} beside it; put what belongs together into a folder of its own"


def parts_of(name: str) -> frozenset[str]:
    """Return the runs of letters in a file name without its extension, in lower case."""
    return frozenset(part.lower() for part in _LETTERS.findall(name.rpartition("/")[2].rpartition(".")[0]))
