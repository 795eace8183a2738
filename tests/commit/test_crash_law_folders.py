"""The crash law of folders at a URL: die, or be replaced, at every operation; only what was acknowledged stays."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal
from uuid import uuid4

import pytest
from fsspec.core import url_to_fs
from support.s3_tools import objects, unfinished
from support.sampling import DAYS, FIRST, instants
from support.servers.fixtures import Serve
from xxhash import xxh3_128

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepLast, Policy
from checkpointer.commit.index import HOME
from checkpointer.errors import ConflictError, CorruptError, SaveError
from checkpointer.ports import Storage, SupportsURLs
from checkpointer.restore.load import verify
from checkpointer.storage import open_storage
from checkpointer.storage import owner as owners
from checkpointer.storage.owner import new_owner
from checkpointer.storage.reader import read_whole
from checkpointer.testing import Crash, CrashingStorage, die
from checkpointer.tools.catalog import look_at
from checkpointer.tools.sweep import sweep

pytestmark = pytest.mark.filterwarnings("ignore::checkpointer.errors.CheckpointerWarning")

When = Literal["before", "halfway", "after"]
NEWEST = Policy(EverySteps(1), [KeepLast(1)])
ALL = Policy(EverySteps(1), [KeepAll()])


class Shards:
    """A folder of three files, each written by an operation of the storage, as ranks write them."""

    name, extension = "shards", ".dcp"

    def __init__(self, storage: Storage, *, digests: bool = True) -> None:
        self._storage = storage
        self._digests = digests

    def _inside(self, url: str) -> str:
        assert isinstance(self._storage, SupportsURLs)
        return url.removeprefix(self._storage.url(""))

    def _read(self, url: str) -> bytes:
        return read_whole(lambda: self._storage.open(self._inside(url)), 1000)

    def write_digested(self, state: Any, path: str, *, algorithm: str) -> Mapping[str, tuple[int, str]] | None:
        assert "xxh3-128" == algorithm
        files = {}
        for number in range(3):
            data = json.dumps({**state, "shard": number}).encode()
            self._storage.write(f"{self._inside(path)}/__{number}_0.distcp", data)
            files[f"__{number}_0.distcp"] = len(data), xxh3_128(data).hexdigest()
        return files if self._digests else None

    def write_folder(self, state: Any, path: str) -> None:
        self.write_digested(state, path, algorithm="xxh3-128")

    def read_folder(self, path: str, **options: Any) -> Any:
        shards = [json.loads(self._read(f"{path}/__{number}_0.distcp")) for number in range(3)]
        assert [0, 1, 2] == [shard.pop("shard") for shard in shards]
        assert [shards[0]] * 3 == shards
        return shards[0]

    def read_verified(self, path: str, *, files: Any, algorithm: str, everything: bool, **options: Any) -> Any:
        for name, file in files.items():
            data = self._read(f"{path}/{name}")
            if (len(data), xxh3_128(data).hexdigest()) != file:
                raise CorruptError(name)
        return self.read_folder(path)

    def refused(self, state: Any) -> Mapping[str, str]:
        return {}


class Run:
    """A training whose state is its step."""

    def __init__(self, storage: Storage, policy: Policy, *, digests: bool = True, **options: Any) -> None:
        self.step = 0
        self.manager = CheckpointManager(
            storage,
            policy,
            state=lambda: {"step": self.step},
            format=Shards(storage, digests=digests),
            **options,
        )

    def save(self) -> bool:
        self.step += 1
        return bool(self.manager.observe({}, step=self.step, epoch=0, epoch_end=False))


@contextlib.contextmanager
def on_host(name: str) -> Any:
    """Let what begins here look like a process of another host."""
    before = owners._host
    owners._host = lambda: f"{name}_0000_1"  # type: ignore[assignment]
    try:
        yield
    finally:
        owners._host = before


def train(
    storage: CrashingStorage, policy: Policy, steps: int, *, digests: bool, **options: Any
) -> tuple[int, Run | None]:
    """Save until the storage dies; return the last step that was acknowledged."""
    run, acknowledged = None, 0
    with contextlib.suppress(Crash, SaveError):
        run = Run(storage, policy, digests=digests, **options)
        for _ in range(steps):
            if run.save():
                acknowledged = run.step
        run.manager.close()
    return acknowledged, run


def files_of(storage: Storage) -> set[str]:
    """Return the folder of each file that is not the manager's own."""
    return {path.partition("/")[0] for path in storage.list() if not path.startswith(f"{HOME}/")}


def check_acknowledged(storage: Storage, policy: Policy, acknowledged: int, clue: str, **options: Any) -> Run:
    """A new process restores what was acknowledged, or what was written after that."""
    run = Run(storage, policy, **options)
    restored = run.manager.restore()
    assert (restored.step if restored else 0) in (acknowledged, acknowledged + 1), clue
    if restored is not None:
        assert {"step": restored.step} == restored.state, clue
        run.step = restored.step
    return run


@pytest.mark.parametrize("digests", [True, False], ids=["digested", "read back"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_dying_at_any_operation_leaves_what_was_acknowledged_and_no_other_file(when: When, digests: bool) -> None:
    """The writer's process has certainly ended, so the next one removes files and record."""
    count = 1
    for n in instants(1000):
        url, owner, clue = f"memory://{uuid4().hex}", new_owner(), f"died {when} operation {n}"
        storage = CrashingStorage(open_storage(url, owner), at=n, when=when)
        acknowledged, run = train(storage, NEWEST, 2, digests=digests)
        die(owner)
        if not storage.is_dead:
            assert 2 == acknowledged
            break
        count += 1
        if run is not None:
            die(run.manager._owner)
        inner = open_storage(url, new_owner())
        after = check_acknowledged(inner, NEWEST, acknowledged, clue)
        assert after.save(), clue
        after.manager.close()
        assert {record.name for record in after.manager.records} == files_of(inner), clue
        assert [] == [*look_at(inner).unfinished], clue
    assert count > 1


@pytest.mark.parametrize("run", [None, "job"], ids=["a new run", "a run by name"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_writer_of_another_host_left_is_removed_by_the_term(when: When, run: str | None) -> None:
    """Nothing shows whether its process has ended. Its record stays, so that no other save takes the name."""
    removed = 0
    for n in range(1 + FIRST % DAYS, 1000, DAYS):  # A tenth of them would miss the few at which files are left.
        url, clue = f"memory://{uuid4().hex}", f"died {when} operation {n}"
        with on_host("node1"):
            storage = CrashingStorage(open_storage(url, new_owner()), at=n, when=when)
            acknowledged, _ = train(storage, ALL, 2, digests=True, run=run)
        if not storage.is_dead:
            break
        inner = open_storage(url, new_owner())
        left = files_of(inner)
        after = check_acknowledged(inner, ALL, acknowledged, clue, takeover=True, run=run)
        unfinished = {entry.record.name for entry in look_at(inner).unfinished}
        assert {record.name for record in after.manager.records} | unfinished >= files_of(inner), clue
        # If nothing was ever acknowledged, a process goes on with the run only if it is given its name.
        assert not (acknowledged or run) or not unfinished & files_of(inner), clue
        removed += bool(left - files_of(inner))
        assert after.save(), clue
        after.manager.close()
        assert not {record.name for record in after.manager.records} & unfinished, clue
        sweep(inner, new_owner(), force=True)
        assert [] == [*look_at(inner).unfinished], clue
        assert {record.name for record in look_at(inner).records} == files_of(inner), clue
    assert removed


class Pausing(CrashingStorage):
    """A storage at whose n-th operation something else happens first."""

    def __init__(self, inner: Storage, at: int, act: Callable[[], object]) -> None:
        super().__init__(inner)
        self._pauses_at = at
        self._act = act

    def _do(self, what: str, effect: Callable[[], Any], **options: Any) -> Any:
        if self.operations + 1 == self._pauses_at:
            self.operations += 1
            self._act()
            return effect()
        return super()._do(what, effect, **options)


@pytest.mark.parametrize("host", ["node1", ""], ids=["another host", "this process"])
def test_a_writer_that_is_replaced_at_any_operation_loses_nothing_that_it_has_acknowledged(host: str) -> None:
    """It is paused, another process takes over, removes what it has begun and saves; then it goes on."""
    ends = set()
    for n in instants(1000):
        url, clue = f"memory://{uuid4().hex}", f"paused before operation {n}"
        inner = open_storage(url, new_owner())
        new: list[Run] = []

        def take_over(inner: Storage = inner, new: list[Run] = new) -> None:
            new.append(Run(inner, ALL, takeover=True))
            restored = new[0].manager.restore()
            new[0].step = restored.step if restored else 10
            new[0].save()

        with on_host(host) if host else contextlib.nullcontext():
            storage = Pausing(open_storage(url, new_owner()), n, take_over)
            old, acknowledged = Run(storage, ALL), list[int]()
            try:
                for _ in range(2):
                    old.save()
                    acknowledged.append(old.step)
                ends.add("done")
            except ConflictError:
                ends.add("fenced")
        if not new:
            break
        records = {record.step: record for record in look_at(inner).records}
        for step in acknowledged:
            verify(inner, records[step])
        for record in new[0].manager.records:
            verify(inner, record)
        new[0].manager.close()
        with Run(inner, ALL, takeover=True).manager as third:
            assert third.restore() is not None, clue
            unfinished = {entry.record.name for entry in look_at(inner).unfinished}
            assert not unfinished & files_of(inner), clue
    assert {"done", "fenced"} == ends


class Killed(BaseException):
    """Ends a save as a kill does: nothing catches it to clear up."""


@pytest.mark.slow
def test_the_parts_of_an_upload_to_s3_that_was_not_finished_are_dropped_with_the_files(serve: Serve) -> None:
    """No listing shows them, and they cost money. DCP's writer begins such uploads under the final name."""
    server = serve("s3")
    url, options = server.fresh(), dict(server.storage_options)

    def write(target: str) -> None:
        files, path = url_to_fs(target, **options)
        files.pipe_file(f"{path}/__0_0.distcp", b"whole")
        if "step=2" in target:
            bucket, key, _ = files.split_path(f"{path}/__1_0.distcp")
            files.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
            raise Killed

    killed = CheckpointManager(url, ALL, save=write, storage_options=options)
    killed.observe({}, step=1, epoch=0, epoch_end=False)
    with pytest.raises(Killed):
        killed.observe({}, step=2, epoch=0, epoch_end=False)
    die(killed._owner)
    assert 1 == len(unfinished(server, url))
    with CheckpointManager(url, ALL, save=write, storage_options=options, run=killed.records[0].run) as manager:
        assert [1] == [record.step for record in manager.records]
    assert [] == unfinished(server, url)
    assert not [path for path in objects(server, url) if "step=2" in path]


def test_a_save_that_fails_removes_its_files_at_once_and_its_record_at_the_next_save() -> None:
    """Another rank may still write when rank 0 gets the error, so the name stays reserved, and the files go again."""
    inner = open_storage(f"memory://{uuid4().hex}", new_owner())

    def write(target: str) -> None:
        name = target.rpartition("/")[2]
        inner.write(f"{name}/__0_0.distcp", b"one")
        if "step=1" in name:
            raise OSError("the bucket refuses")

    with CheckpointManager(inner, ALL, save=write) as manager:
        with pytest.raises(SaveError, match="the bucket refuses"):
            manager.observe({}, step=1, epoch=0, epoch_end=False)
        assert set() == files_of(inner)
        assert ["epoch=0-step=1.ckpt"] == [entry.record.name for entry in look_at(inner).unfinished]
        inner.write("epoch=0-step=1.ckpt/__1_0.distcp", b"late")
        manager.observe({}, step=2, epoch=0, epoch_end=False)
        assert {"epoch=0-step=2.ckpt"} == files_of(inner)
        assert [] == [*look_at(inner).unfinished]
