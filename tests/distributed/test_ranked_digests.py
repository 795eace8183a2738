"""Each rank digests its shards as it writes them, and verifies what it reads: nothing is read back."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import attrs
import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from support.servers.chaosproxy import ChaosProxy
from support.servers.fixtures import Serve, lacks
from support.together import together
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, HMACKey, KeepAll, Policy
from checkpointer.distributed.manager import DistributedManager
from checkpointer.errors import CorruptError, RestoreError, SaveError
from checkpointer.formats.dcp_folder import DcpFormat
from checkpointer.records.digest_algorithms import ALGORITHM
from checkpointer.restore.load import Verify
from checkpointer.storage import LocalStorage
from checkpointer.storage.digests import digest_of
from checkpointer.tools.catalog import look_at
from checkpointer.tools.verify import verify_all

pytestmark = pytest.mark.slow

POLICY = Policy(EverySteps(1), [KeepAll()], name="{step}")
AT_ONCE_S = 2.0
SIZE = 1 << 20
"""Elements of a shard: 4 MB."""
KEY = b"0123456789abcdef"


def sharded(value: float, size: int = 64) -> dict[str, Any]:
    """Return a state with two sharded tensors and two values that every rank has."""
    ranks = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    here = value + torch.distributed.get_rank() / 10 + torch.arange(size) / size

    def shard(tensor: torch.Tensor) -> DTensor:
        return DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)

    return {"w": shard(here), "b": shard(here[:4] * 2), "same": torch.full((3,), value), "step": int(value)}


def save(manager: DistributedManager, state: dict[str, Any], value: float) -> None:
    state |= sharded(value, len(state["w"].to_local()))
    manager.observe({}, int(value), 0, epoch_end=False)


def bytes_read() -> int:
    """Return how many bytes this process has read by system calls, from wherever."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar:")[1].split()[0])


def count_reads(rank: int, directory: Path, background: Any, key: bytes | None) -> Any:
    state: dict[str, Any] = sharded(0, SIZE)
    options: dict[str, Any] = {"background": background, "trust": HMACKey(key) if key else None}
    with DistributedManager(directory, POLICY, state=lambda: state, format="dcp", **options) as manager:
        save(manager, state, 1)
        manager.wait()
        before = bytes_read()
        save(manager, state, 2)
        manager.wait()
        read = bytes_read() - before
        hows: tuple[Verify, ...] = ("full", "mine")
        for how in hows:
            state |= sharded(0, SIZE)
            restored = manager.restore(verify=how)
            assert restored is not None
            assert 2 == restored.state["step"]
            assert torch.equal(sharded(2, SIZE)["w"].to_local(), restored.state["w"].to_local())
        return read


@pytest.mark.parametrize(("background", "key"), [(None, None), ("wait", KEY)], ids=["in the loop", "behind, signed"])
def test_a_save_reads_nothing_back_and_its_record_has_the_digest_of_each_file(
    tmp_path: Path, background: Any, key: bytes | None
) -> None:
    """Counted by the kernel. Later the digests are those of the bytes on the disk."""
    reads = together(2, count_reads, tmp_path, background, key)

    assert all(read < SIZE // 4 for read in reads), reads
    storage = LocalStorage(tmp_path, "")
    with CheckpointManager(tmp_path, format="dcp", trust=HMACKey(key) if key else None) as manager:
        record = manager.records[-1]
        assert {".metadata", "__0_0.distcp", "__1_0.distcp"} == record.files.keys()
        algorithm = record.digest.partition(":")[0]
        assert f"files-{'sha256' if key else ALGORITHM}" == algorithm
        assert (record.size, record.digest) == digest_of(storage, record.name, algorithm)
        for inside, file in record.files.items():
            size, digest = digest_of(storage, f"{record.name}/{inside}", algorithm.removeprefix("files-")) or (0, "")
            assert (size, digest.partition(":")[2]) == file


class ListeningProxy(ChaosProxy):
    """Forwards everything, and remembers each request."""

    def __init__(self, upstream: int) -> None:
        super().__init__(upstream)
        self.heads: list[bytes] = []

    def strikes(self, *, head: bytes) -> None:
        self.heads.append(head.split(b"\r\n")[0])


def save_at_url(rank: int, url: str, options: dict[str, Any]) -> Any:
    state = sharded(0)
    with DistributedManager(url, POLICY, state=lambda: state, format="dcp", storage_options=options) as manager:
        save(manager, state, 1)
        save(manager, state, 2)


def test_a_save_reads_nothing_back_from_a_bucket(serve: Serve) -> None:
    """No request of the save asks for a byte of the folder: rank 0 lists it, and the server moves the metadata."""
    server = serve("s3")
    proxy = ListeningProxy(server.port)
    with proxy:
        behind = attrs.evolve(server, port=proxy.port)
        url = behind.fresh()
        together(2, save_at_url, url, dict(behind.storage_options))
        heads = [*proxy.heads]
    inside = [head for head in heads if re.search(rb"distcp|\.metadata", head) and b"list-type" not in head]
    assert [head for head in inside if head.startswith(b"PUT")]
    assert [] == [head for head in inside if head.startswith(b"GET")]


# Damage


def at_once(act: Callable[[], Any]) -> tuple[str, str, bool]:
    """Return the error that an act raises on this rank, and whether that took less than two seconds."""
    start = time.monotonic()
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start < AT_ONCE_S
    return "", "", True


def change(path: Path, offset: int) -> Callable[[], object]:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    return lambda: (data.__setitem__(offset, data[offset] ^ 1), path.write_bytes(data))


def damage(rank: int, directory: Path) -> Any:
    state = sharded(0)
    manager = DistributedManager(directory, POLICY, state=lambda: state, format="dcp")
    for step in (1, 2):
        save(manager, state, step)
    found: dict[str, Any] = {}

    def look(what: str, harm: Callable[[], Callable[[], object]]) -> None:
        heal = harm() if rank == 0 else None
        torch.distributed.barrier()
        restore = functools.partial(manager.restore, "step=2.dcp")
        found[what] = [at_once(restore), at_once(functools.partial(restore, verify="mine"))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointerWarning)
            restored = manager.restore()
        found[f"{what}, newest"] = restored.step if restored else None
        catalog = look_at(LocalStorage(directory, ""))
        looked_at = [record for record in catalog.records if record.step == 2]
        found[f"{what}, verify"] = [finding.problem for finding in verify_all(catalog, looked_at)]
        torch.distributed.barrier()
        if heal is not None:
            heal()
        torch.distributed.barrier()

    folder = directory / "step=2.dcp"
    third = folder / "__3_0.distcp"
    w3 = torch.full((1,), 2 + 3 / 10).numpy().tobytes()

    def swap() -> Callable[[], object]:
        before = third.read_bytes()
        shutil.copyfile(directory / "step=1.dcp" / third.name, third)
        return lambda: third.write_bytes(before)

    def lose() -> Callable[[], object]:
        before = third.read_bytes()
        third.unlink()
        return lambda: third.write_bytes(before)

    look("flipped", lambda: change(third, third.read_bytes().index(w3)))
    look("another step's", swap)
    look("gone", lose)
    look("metadata", lambda: change(folder / ".metadata", 40))
    restored = manager.restore("step=2.dcp")
    assert restored is not None
    found["healed"] = restored.step
    manager.close()
    return found


def test_damage_of_one_rank_s_shards_is_an_error_on_all_ranks_that_names_it(tmp_path: Path) -> None:
    """A flipped byte, a shard of another step under the right name, a missing one; the older checkpoint is whole."""
    results = together(4, damage, tmp_path)

    assert 4 == len(results)
    assert [results[0]] * 4 == results
    found = results[0]
    texts = {
        "flipped": "step=2.dcp: w in its file __3_0.distcp (the shards of rank 3) has other bytes than were written",
        "another step's": "step=2.dcp: its file __3_0.distcp (the shards of rank 3) is not the one that was written: "
        "all that was read of it differs",
        "gone": "step=2.dcp lacks __3_0.distcp (the shards of rank 3)",
        "metadata": "step=2.dcp: its file .metadata has other bytes than were written",
    }
    for what, text in texts.items():
        assert [("CorruptError", text, True)] * 2 == found[what], what
        assert 1 == found[f"{what}, newest"], what
    third = "__3_0.distcp (the shards of rank 3)"
    differs = "has other bytes than were written: its digest differs from its record's; other bytes are in"
    assert [f"{differs} w of {third}"] == found["flipped, verify"]
    assert [f"{differs} w, b of {third}"] == found["another step's, verify"]
    assert [f"{differs} .metadata"] == found["metadata, verify"]
    assert 2 == found["healed"]


@functools.cache
def libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def hide(directory: Path) -> None:
    """Give this thread an empty folder of its own at that path."""
    private, recursive, new_namespace = 1 << 18, 1 << 14, 0x20000
    assert 0 == libc().unshare(new_namespace), os.strerror(ctypes.get_errno())
    assert 0 == libc().mount(b"none", b"/", None, private | recursive, None)
    assert 0 == libc().mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, None)


def save_apart(rank: int, directory: Path) -> Any:
    state = sharded(0)
    manager = DistributedManager(directory, POLICY, state=lambda: state, format="dcp")
    save(manager, state, 1)
    if rank:
        hide(directory)
    errors = [at_once(lambda: save(manager, state, 2)), at_once(lambda: manager.restore())]
    manager.close()
    return errors, [path.name for path in directory.rglob("*.distcp")] if rank else []


def test_ranks_that_see_different_directories_get_an_error(tmp_path: Path) -> None:
    """Nothing is written where rank 0 does not see it, and the older checkpoint is whole."""
    if os.geteuid() != 0:
        lacks("namespaces", "needs root")
    results = together(2, save_apart, tmp_path)

    assert [([], [])] * 2 != results
    for (saving, restoring), left in results:
        assert ("SaveError", True) == (saving[0], saving[2])
        assert "does not see" in saving[1]
        assert ("RestoreError", True) == (restoring[0], restoring[2])
        assert "rank 1 does not find" in restoring[1]
        assert [] == left
    with CheckpointManager(tmp_path, format="dcp") as manager:
        restored = manager.restore()
        assert restored is not None
        assert 1 == restored.step


def begin_apart(rank: int, directory: Path, format: str) -> Any:
    if rank == 0:
        hide(directory)
    manager = DistributedManager(directory, POLICY, state=lambda: sharded(0), format=format)
    error = at_once(manager.restore)
    manager.close()
    return error


@pytest.mark.parametrize("format", ["torch", "dcp"])
def test_a_training_does_not_begin_anew_if_another_rank_sees_its_checkpoints(tmp_path: Path, format: str) -> None:
    """Rank 0 was started on another host, and each host has a disk of its own."""
    if os.geteuid() != 0:
        lacks("namespaces", "needs root")
    with CheckpointManager(tmp_path, POLICY, state=lambda: {"w": torch.ones(9)}) as manager:
        manager.observe({}, 1, 0, epoch_end=False)
    for kind, text, quick in together(2, begin_apart, tmp_path, format):
        assert ("RestoreError", True) == (kind, quick)
        assert f"rank 0 finds no checkpoint in {tmp_path}" in text
        assert "rank 1 finds some there" in text


def save_in_own_memory(rank: int) -> Any:
    state = sharded(0)
    manager = DistributedManager("memory://apart", POLICY, state=lambda: state, format="dcp")
    error = at_once(lambda: save(manager, state, 1))
    manager.close()
    return error


def test_ranks_whose_storages_differ_get_an_error(tmp_path: Path) -> None:
    """As a path of each node's own disk, or memory."""
    for kind, text, quick in together(2, save_in_own_memory):
        assert ("SaveError", True) == (kind, quick)
        assert "__1_0.distcp (the shards of rank 1) cannot be seen by rank 0" in text


# One process


class Undigested:
    """Writes folders as earlier versions did: the files are read for their digest."""

    name, extension = "dcp", ".dcp"

    def __init__(self) -> None:
        self.write_folder = DcpFormat().write_folder
        self.read_folder = DcpFormat().read_folder
        self.refused = DcpFormat().refused


def test_folders_of_earlier_versions_are_still_verified(tmp_path: Path) -> None:
    """Their records have one digest over all bytes."""
    with CheckpointManager(tmp_path, POLICY, state=lambda: {"w": torch.ones(9)}, format=Undigested()) as manager:
        manager.observe({}, 1, 0, epoch_end=False)
        assert not manager.records[-1].files
        assert manager.records[-1].digest.startswith(f"{ALGORITHM}:")
    with CheckpointManager(tmp_path, format="dcp") as manager:
        restored = manager.restore()
        assert restored is not None
        assert [1.0] * 9 == restored.state["w"].tolist()
        (shard,) = (tmp_path / "step=1.dcp").glob("*.distcp")
        change(shard, shard.stat().st_size // 2)
        with pytest.raises(CorruptError, match="has other bytes than were written: its digest differs"):
            manager.restore("step=1.dcp")


class ListeningFiles(MemoryFileSystem):  # type: ignore[misc]
    """A memory that remembers which paths were opened for reading."""

    protocol = "listening"
    store: ClassVar[dict[str, Any]] = {}
    opened: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("listening://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self.opened.extend([path] if mode == "rb" else [])
        return super()._open(path, mode, **kwargs)


def test_a_restore_opens_each_file_once() -> None:
    """It verifies what it loads, and a save opens nothing of its folder."""
    fsspec.register_implementation("listening", ListeningFiles, clobber=True)
    opened, state = ListeningFiles.opened, {"w": torch.ones(9), "step": 3}
    with CheckpointManager("listening://run", POLICY, state=lambda: state, format="dcp") as manager:
        manager.observe({}, 1, 0, epoch_end=False)
        assert [] == [path for path in opened if "distcp" in path or ".metadata" in path]
        manager.restore()
    assert ["__0_0.distcp"] == [path.rpartition("/")[2] for path in opened if "distcp" in path]


def test_a_record_whose_files_have_another_digest_is_damaged(tmp_path: Path) -> None:
    """The names of files and their digests cannot be changed apart from the digest of the folder."""
    with CheckpointManager(tmp_path, POLICY, state=lambda: {"w": torch.ones(9)}, format="dcp") as manager:
        manager.observe({}, 1, 0, epoch_end=False)
        digits = manager.records[-1].files["__0_0.distcp"][1]
    path = next((tmp_path / ".checkpointer" / "records").iterdir())
    path.write_text(path.read_text().replace(digits, digits[::-1]))
    with CheckpointManager(tmp_path, format="dcp") as manager, pytest.raises(RestoreError, match="do not have its dig"):
        manager.restore("step=1.dcp")


def test_a_file_that_another_program_adds_during_the_save_is_refused(tmp_path: Path) -> None:
    """The digest would not cover it."""

    class Disturbed(DcpFormat):
        def write_digested(self, state: Any, path: str, *, algorithm: str) -> Any:
            files = super().write_digested(state, path, algorithm=algorithm)
            Path(path, "notes.txt").write_text("mine")
            return files

    state = {"w": torch.ones(9)}
    with CheckpointManager(tmp_path, POLICY, state=lambda: state, format=Disturbed()) as manager:
        with pytest.raises(SaveError, match=r"notes\.txt in '.*' was written by another program"):
            manager.observe({}, 1, 0, epoch_end=False)
        assert () == manager.records
