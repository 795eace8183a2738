"""Opens any payload to look into it. Its bytes decide on the format, not its name or record."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Final, Literal

import attrs

from checkpointer.errors import CheckpointerError, CorruptError, NotFoundError, reading
from checkpointer.formats.inspection.safetensors_file import MAX_HEADER_BYTES, SafetensorsContents
from checkpointer.formats.inspection.tensors import Part, TensorInfo, Tensors
from checkpointer.formats.inspection.torch_file import open_torch
from checkpointer.ports import Storage

DCP: Final = ".metadata"
"""The file that makes a folder a DCP folder."""
_START: Final = 16
"""Bytes of a file that show what it is."""
_ZIP: Final = b"PK"
_PICKLE: Final = b"\x80"
_HDF5: Final = b"\x89HDF\r\n"
_MAGIC_AS_TEXT: Final = b"L1195470371460388"
"""The start of a pickle of protocol 0 with the number that torch writes first."""
MAX_JSON_BYTES: Final = 1 << 28
_TEXT: Final = (".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".csv", ".py", ".jinja", ".log", ".html")
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""A file of one of these that cannot be read is damage; of others it is something else."""
INDEX: Final = ".index.json"
"""What the name of an index of shards ends with, after that of the file that they are."""
_MODEL: Final = re.compile(
    r"(?:.*/)?(?:model|pytorch_model|adapter_model|diffusion_pytorch_model)(_\d+)?\.(safetensors|bin)"
)
"""Files of weights of Hugging Face and accelerate; accelerate numbers the models."""
_HEAD: Final = "lm_head.weight"
_LANGUAGE_MODELS: Final = ("LMHeadModel", "ForCausalLM")
_EMBEDDINGS: Final = ("wte.weight", "embed_tokens.weight", "embed_in.weight", "word_embeddings.weight")
"""Names in transformers of the weights that a language model may tie to its head."""


@contextlib.contextmanager
def open_contents(storage: Storage, name: str) -> Iterator[Tensors]:
    """Open a payload: torch file, safetensors, DCP folder, or a folder of such files.

    Args:
        storage: Where it is.
        name: Its path there; the empty text stands for the storage itself as a folder.

    Raises:
        CorruptError: If it is not one of these, or damaged.
        UnsafePayloadError: If the metadata of a DCP folder names foreign classes.

    Example:
        >>> import io, torch
        >>> from checkpointer.testing import MemoryStorage
        >>> storage = MemoryStorage()
        >>> stream = io.BytesIO()
        >>> torch.save({"model": {"w": torch.ones(2, 3)}, "step": 7}, stream)
        >>> storage.write("a.ckpt", stream.getvalue())
        >>> with open_contents(storage, "a.ckpt") as contents:
        ...     print(contents.tensors["model.w"].shape, contents.others)
        (2, 3) {'step': 7}
    """
    with contextlib.closing(_open(storage, name)) as contents:
        yield contents


@contextlib.contextmanager
def open_files(storage: Storage, folder: str, files: Iterable[str]) -> Iterator[Tensors]:
    """Open some files of a folder as one payload. Their names in it are relative to the folder."""
    with contextlib.closing(_FolderContents(storage, folder, files)) as contents:
        yield contents


def _open(storage: Storage, name: str) -> Tensors:
    files = storage.list(name)
    if (f"{name}/{DCP}" if name else DCP) not in files:
        return _FolderContents(storage, name, files) if files and name not in files else _open_file(storage, name)
    from checkpointer.formats.inspection.dcp_folder import DcpContents

    with reading(name):
        return DcpContents(storage, name)


def _open_file(storage: Storage, name: str) -> Tensors:
    try:
        stream = storage.open(name)
    except (FileNotFoundError, IsADirectoryError) as error:
        msg = f"{name} is gone, though its record is there"
        raise CorruptError(msg) from error
    return open_stream(stream, name)


def open_stream(stream: BinaryIO, name: str) -> Tensors:
    """Open a seekable stream at its start; it is closed with the contents, or with the error that names the file."""
    try:
        with reading(name):
            if stream.read(len(_HDF5)) == _HDF5:
                msg = "it is an HDF5 file, as keras writes, which is not read here"
                raise CorruptError(msg)
            contents: Tensors = open_torch(stream) if sniff(stream) == "torch" else SafetensorsContents(stream)
    except BaseException:
        stream.close()
        raise
    contents.place = name
    return contents


def sniff(stream: BinaryIO) -> Literal["torch", "safetensors"] | None:
    """Return the format of a file, or None if it is neither; the stream is at its start again afterwards.

    An extension or a record may be wrong, so the first bytes decide. A zip file and a pickle count as torch files.
    """
    stream.seek(0)
    start = stream.read(_START)
    stream.seek(0)
    # This comes first because the length of a safetensors header may begin with any byte.
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        return "safetensors"
    return "torch" if start.startswith((_ZIP, _PICKLE, _MAGIC_AS_TEXT[:_START])) else None


# Folders that a trainer wrote: files that hold tensors, and shards with their index


class _FolderContents(Tensors):
    """An opened folder. The name of a tensor is its file and its name in the file."""

    def __init__(self, storage: Storage, name: str, files: Iterable[str]) -> None:
        super().__init__()
        self._storage = storage
        self._prefix = f"{name}/" if name else ""
        self._files: dict[str, Tensors] = {}
        self._inner: dict[str, tuple[Tensors, str]] = {}
        """The file of each tensor and value, and its name there."""
        try:
            for path in sorted(files):
                self._add(path, path.removeprefix(self._prefix))
            self._join()
        except BaseException:
            self.close()
            raise
        self.calls = tuple(sorted({call for part in self._files.values() for call in part.calls}))

    def _add(self, path: str, inside: str) -> None:
        opened = _opened(self._storage, path)
        if opened is None:
            self.others[inside] = "<file>"
            return
        self._files[inside] = opened
        for name, info in opened.tensors.items():
            full = f"{inside}: {name}"
            self.tensors[full] = attrs.evolve(info, name=full)
            self._inner[full] = opened, name
        for name, value in opened.others.items():
            self.others[f"{inside}: {name}"] = value
            self._inner[f"{inside}: {name}"] = opened, name
        for path_inside, part in opened.parts.items():
            names, values = ({name: f"{inside}: {own}" for name, own in m.items()} for m in (part.names, part.values))
            key = f"{inside}: {path_inside}" if path_inside else inside
            self.parts[key] = attrs.evolve(part, names=names, values=values)

    def _join(self) -> None:
        """Make one set of weights of the shards of each index, and leave out those that are there twice."""
        for index in [inside for inside in self.others if inside.endswith(INDEX)]:
            self.parts[index.removesuffix(INDEX)] = self._joined(index, self._read_index(index))
        for key, part in self.parts.items():
            config = f"{key.rpartition('/')[0]}/config.json".lstrip("/")
            if _MODEL.fullmatch(key) and _HEAD not in part.names and config in self.others:
                tied = _tied(self._read_json(config), part, self.tensors)
                self.parts[key] = attrs.evolve(part, names={**part.names, **tied})
        for key in [*self.parts]:
            # Hugging Face prefers safetensors to the same weights in a file of pickles.
            stem = key.removesuffix("pytorch_model.bin")
            if stem != key and f"{stem}model.safetensors" in self.parts:
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

    def _read_json(self, inside: str) -> Any:
        path = self._prefix + inside
        try:
            with self._storage.open(path) as stream:
                return json.loads(stream.read(MAX_JSON_BYTES))
        except (ValueError, RecursionError) as error:
            msg = f"{path} cannot be read as JSON: {error}"
            raise CorruptError(msg) from error

    def _read_index(self, inside: str) -> dict[str, str]:
        match self._read_json(inside):
            case {"weight_map": dict(found)} if all(isinstance(shard, str) for shard in found.values()):
                return found
        msg = f"{self._prefix}{inside} is not an index of shards: it has no weight_map of names to files"
        raise CorruptError(msg)

    @property
    def models(self) -> Mapping[str, Part]:
        """The sets of weights whose files have the names that Hugging Face and accelerate give to models.

        If the folder itself has none, those of the folders in it count.
        """
        found = {key: part for key, part in self.parts.items() if _MODEL.fullmatch(key)}
        return {key: part for key, part in found.items() if "/" not in key} or found or self.parts

    def problems(self) -> Iterator[str]:
        for inside, part in self._files.items():
            yield from (f"{inside}: {problem}" for problem in part.problems())

    def read(self, name: str) -> Any:
        opened, inner = self._inner[name]
        return opened.read(inner)  # Its error names the file.

    def value(self, name: str) -> Any:
        opened, inner = self._inner.get(name, (None, ""))
        return None if opened is None else opened.value(inner)

    def close(self) -> None:
        for part in self._files.values():
            part.close()


def _opened(storage: Storage, path: str) -> Tensors | None:
    """Open a file if it holds tensors, or should."""
    if path.endswith(_TEXT):
        return None
    with storage.open(path) as stream:
        kind = sniff(stream)
        start = stream.read(_START)
    if path.endswith(_WEIGHTS):
        # SpeechBrain has files of text among its .ckpt files.
        is_text = start and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in start)
        return None if is_text else _open_file(storage, path)
    try:
        return None if kind is None else _open_file(storage, path)
    except CheckpointerError:
        return None  # Other programs write zip files and pickles too.


def _tied(config: Any, part: Part, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the head of a language model that is tied to its embedding, if the file has only the latter."""
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
