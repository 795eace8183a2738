"""Looks into a folder that a trainer wrote: its files that hold tensors, shards put together by their index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import attrs

from checkpointer.errors import CheckpointerError, CorruptError, NotFoundError
from checkpointer.formats.inspection.file_kind import START, sniff
from checkpointer.formats.inspection.tensors import TensorInfo, Tensors
from checkpointer.formats.inspection.weight_sets import Part
from checkpointer.ports import Storage

__all__ = ["FolderContents"]

MAX_JSON_BYTES: Final = 1 << 28
_TEXT: Final = (".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".csv", ".py", ".jinja", ".log", ".html")
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""A file of one of these that cannot be read is damage; of others it is something else."""
_INDEX: Final = ".index.json"
_MODEL: Final = re.compile(
    r"(?:.*/)?(?:model|pytorch_model|adapter_model|diffusion_pytorch_model)(_\d+)?\.(safetensors|bin)"
)
"""What Hugging Face and accelerate call the weights of a model; of accelerate's, the number is the model's."""

_HEAD: Final = "lm_head.weight"
_LANGUAGE_MODELS: Final = ("LMHeadModel", "ForCausalLM")
_EMBEDDINGS: Final = ("wte.weight", "embed_tokens.weight", "embed_in.weight", "word_embeddings.weight")
"""What transformers calls the weights of a language model that are one tensor under two names."""


class FolderContents:
    """An opened folder, see `Tensors`. Each tensor is called by its file and its name in it.

    Args:
        storage: Where it is.
        name: The folder's path there.
        files: The paths of its files.
        open_file: Opens one of them.

    Raises:
        CorruptError: If a file of weights cannot be read, or an index of shards is wrong.
        NotFoundError: If a shard that an index names is not there.
    """

    def __init__(
        self, storage: Storage, name: str, files: Iterable[str], open_file: Callable[[Storage, str], Tensors]
    ) -> None:
        self._files: dict[str, Tensors] = {}
        self._of: dict[str, tuple[str, str]] = {}
        self._values: dict[str, tuple[str, str]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.others: dict[str, Any] = {}
        self.parts: dict[str, Part] = {}
        start = len(name) + 1 if name else 0
        try:
            for path in sorted(files):
                self._add(storage, path, path[start:], open_file)
            self._join(storage, name)
        except BaseException:
            self.close()
            raise
        self.calls = tuple(sorted({call for part in self._files.values() for call in part.calls}))

    def _add(self, storage: Storage, path: str, inside: str, open_file: Callable[[Storage, str], Tensors]) -> None:
        opened = _opened(storage, path, open_file)
        if opened is None:
            self.others[inside] = "<file>"
            return
        self._files[inside] = opened
        for name, info in opened.tensors.items():
            full = f"{inside}: {name}"
            self.tensors[full] = attrs.evolve(info, name=full)
            self._of[full] = (inside, name)
        for name, value in opened.others.items():
            self.others[f"{inside}: {name}"] = value
            self._values[f"{inside}: {name}"] = (inside, name)
        for path_inside, part in opened.parts.items():
            key = f"{inside}: {path_inside}" if path_inside else inside
            self.parts[key] = attrs.evolve(part, names=_within(inside, part.names), values=_within(inside, part.values))

    def _join(self, storage: Storage, name: str) -> None:
        """Make one set of weights of the shards of each index, and leave out those that are there twice."""
        for index in [inside for inside in self.others if inside.endswith(_INDEX)]:
            joined = self._joined(index, _read_index(storage, f"{name}/{index}" if name else index))
            self.parts[index.removesuffix(_INDEX)] = joined
        for key, part in self.parts.items():
            config = f"{key.rpartition('/')[0]}/config.json".lstrip("/")
            if _MODEL.fullmatch(key) and _HEAD not in part.names and config in self.others:
                tied = _tied(_read_json(storage, f"{name}/{config}" if name else config), part, self.tensors)
                self.parts[key] = attrs.evolve(part, names={**part.names, **tied})
        for key in [*self.parts]:
            # Hugging Face prefers safetensors to the same weights in a file of pickles.
            if (
                key.endswith("pytorch_model.bin")
                and f"{key.removesuffix('pytorch_model.bin')}model.safetensors" in self.parts
            ):
                del self.parts[key]

    def _joined(self, index: str, where: Mapping[str, str]) -> Part:
        folder = index.rpartition("/")[0]
        names = {}
        for name, shard in where.items():
            if "/" in shard or shard.startswith("."):
                msg = f"{index} names the shard {shard!r}, which is not in its directory"
                raise CorruptError(msg)
            inside = f"{folder}/{shard}" if folder else shard
            if inside not in self._files:
                beside = ", ".join(sorted(self._files)[:8]) or "no weights at all"
                msg = f"{index} names the shard {shard}, which is not there; beside it: {beside}"
                raise NotFoundError(msg)
            if f"{inside}: {name}" not in self.tensors:
                msg = f"{index} says that {name!r} is in {shard}, which does not have it"
                raise CorruptError(msg)
            names[name] = f"{inside}: {name}"
            self.parts.pop(inside, None)
        return Part(names=names)

    @property
    def models(self) -> dict[str, Part]:
        """The sets of weights whose files are called as Hugging Face and accelerate call those of models.

        Those of the folder itself count, and only if it has none, those of folders in it.
        """
        found = {key: part for key, part in self.parts.items() if _MODEL.fullmatch(key)}
        return {key: part for key, part in found.items() if "/" not in key} or found

    def problems(self) -> Iterator[str]:
        """Yield what is wrong in each file."""
        for inside, part in self._files.items():
            yield from (f"{inside}: {problem}" for problem in part.problems())

    def read(self, name: str) -> Any:
        """See `Tensors.read`."""
        inside, inner = self._of[name]
        return self._files[inside].read(inner)

    def value(self, name: str) -> Any:
        """See `Tensors.value`."""
        if name not in self._values:
            return None
        inside, inner = self._values[name]
        return self._files[inside].value(inner)

    def close(self) -> None:
        """See `Tensors.close`."""
        for part in self._files.values():
            part.close()


def _within(inside: str, names: Mapping[str, str]) -> dict[str, str]:
    return {name: f"{inside}: {full}" for name, full in names.items()}


def _opened(storage: Storage, path: str, open_file: Callable[[Storage, str], Tensors]) -> Tensors | None:
    """Open a file if it holds tensors, or should."""
    if path.endswith(_TEXT):
        return None
    if not path.endswith(_WEIGHTS):
        with storage.open(path) as stream:
            if sniff(stream) is None:
                return None
        try:
            return open_file(storage, path)
        except CheckpointerError:
            return None  # Other programs write zip files and pickles too.
    with storage.open(path) as stream:
        start = stream.read(START)
    return None if start and _is_text(start) else open_file(storage, path)


def _is_text(start: bytes) -> bool:
    """Return whether a file begins as text does: SpeechBrain has such files among its ``.ckpt`` ones."""
    return all(32 <= byte < 127 or byte in b"\t\n\r" for byte in start)


def _read_json(storage: Storage, path: str) -> Any:
    try:
        with storage.open(path) as stream:
            return json.loads(stream.read(MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        msg = f"{path} cannot be read as JSON: {error}"
        raise CorruptError(msg) from error


def _read_index(storage: Storage, path: str) -> dict[str, str]:
    match _read_json(storage, path):
        case {"weight_map": dict(found)} if all(isinstance(shard, str) for shard in found.values()):
            return found
    msg = f"{path} is not an index of shards: it has no weight_map of names to files"
    raise CorruptError(msg)


def _tied(config: Any, part: Part, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the name of the head of a language model that is tied to its embedding: the file has only the latter."""
    match config:
        case {"tie_word_embeddings": False | None}:
            return {}
        # transformers 4 leaves tie_word_embeddings out if it is true.
        case {"architectures": [str(kind)], "vocab_size": int(size)}:
            if kind.endswith(_LANGUAGE_MODELS):
                found = [full for name, full in part.names.items() if name.endswith(_EMBEDDINGS)]
                if len(found) == 1 and tensors[found[0]].shape[:1] == (size,):
                    return {_HEAD: found[0]}
    return {}
