"""The requests and bytes of a save and an opening on S3, counted by a proxy."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import attrs
import pytest
from support.factories import record
from support.s3_tools import LargeFormat
from support.sampling import EVERY
from support.servers import Server
from support.servers.counting import CountingProxy
from support.servers.fixtures import Serve

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepBest, KeepLast, Policy
from checkpointer.commit import index
from checkpointer.commit.journal import aborting
from checkpointer.commit.writer_marks import mark, unmark
from checkpointer.records.record import Entry
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner
from checkpointer.storage.reader import read_whole
from checkpointer.storage.remote import FsspecStorage
from checkpointer.storage.s3 import S3Storage, _Multipart
from checkpointer.testing import die

pytestmark = pytest.mark.slow

MIB = 1 << 20


@pytest.fixture
def proxy(serve: Serve) -> Iterator[CountingProxy]:
    with CountingProxy(serve("s3").port) as proxy:
        yield proxy


@pytest.fixture
def server(serve: Serve, proxy: CountingProxy) -> Server:
    return attrs.evolve(serve("s3"), port=proxy.port)


@pytest.mark.parametrize("how", ["copy", "link"])
def test_an_alias_costs_no_uploaded_bytes(server: Server, proxy: CountingProxy, how: Literal["copy", "link"]) -> None:
    """The server copies. Beside the payload only records and request heads are sent."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)], last=how, best=how)
    state = {"w": "x" * 40 * MIB}
    with CheckpointManager(
        server.fresh(), policy, state=lambda: state, storage_options=server.storage_options
    ) as manager:
        manager.observe({"loss": 2.0}, step=1, epoch=0)
        proxy.start()
        manager.observe({"loss": 1.0}, step=2, epoch=1)

        assert manager.last is not None
        assert 40 * MIB < manager.last.size
        assert {"copy": 2, "part": 3} == {kind: proxy.kinds[kind] for kind in ("copy", "part")}
        assert manager.last.size < proxy.sent < manager.last.size + 64 * 1024


SMALL_SAVE = {"list": 10, "HEAD": 2, "PUT if absent": 2, "PUT": 3, "DELETE": 2}
"""Without an alias, and with one checkpoint to retire. Two lists look for a higher term; one PUT ends the changes."""
LARGE_SAVE = {**SMALL_SAVE, "PUT if absent": 1, "PUT": 5, "DELETE": 3}
LARGE_SAVE |= {"begin multipart": 1, "part": 3, "complete multipart": 1}
ALIAS = {"list": 3, "copy": 1}


@pytest.mark.parametrize("last", ["copy", None])
@pytest.mark.parametrize(("size", "save"), [(10, SMALL_SAVE), (40 * MIB, LARGE_SAVE)], ids=["small", "multipart"])
def test_a_save_costs_these_requests(
    server: Server, proxy: CountingProxy, size: int, save: dict[str, int], last: Literal["copy"] | None
) -> None:
    """If a change needs fewer requests, lower these numbers."""
    policy = Policy(EverySteps(1), [KeepLast(1)], last=last)
    options = dict(server.storage_options)
    with CheckpointManager(
        server.fresh(), policy, state=dict, format=LargeFormat(size), storage_options=options
    ) as manager:
        for step in (1, 2, 3):
            proxy.start()
            manager.observe({}, step=step, epoch=0, epoch_end=False)
        expected = Counter(save) + Counter(ALIAS if last else {})
        assert expected == proxy.kinds


CLOSING = {"list": 5, "HEAD": 1, "GET": 1, "PUT": 2, "DELETE": 1}
"""The index is brought up to date, the term is ended, and the mark and the staging folder are removed."""
RELEASED_ALIAS = {"list": 2, "HEAD": 1, "GET": 1, "PUT": 3, "DELETE": 1}
"""Its marker is read and emptied. Before that the change is announced and a claim looked for; then it is ended."""


@pytest.mark.parametrize("last", ["copy", None])
def test_closing_costs_these_requests(server: Server, proxy: CountingProxy, last: Literal["copy"] | None) -> None:
    """They do not depend on the payload. If a change needs fewer requests, lower these numbers."""
    policy, options = Policy(EverySteps(1), [KeepLast(1)], last=last), dict(server.storage_options)
    manager = CheckpointManager(server.fresh(), policy, state=dict, format=LargeFormat(10), storage_options=options)
    manager.observe({}, step=1, epoch=0, epoch_end=False)
    proxy.start()
    manager.close()
    expected = Counter(CLOSING) + Counter(RELEASED_ALIAS if last else {})
    assert expected == proxy.kinds


def test_a_save_that_retires_for_a_better_one_looks_at_it_with_one_request(
    server: Server, proxy: CountingProxy
) -> None:
    """It needs one request more than a save that retires its predecessor, whatever the number of checkpoints."""
    policy = Policy(EverySteps(1), [KeepBest(3, "loss", mode="min"), KeepLast(1)])
    with CheckpointManager(
        server.fresh(), policy, state=dict, format=LargeFormat(10), storage_options=server.storage_options
    ) as manager:
        for step, loss in enumerate((0.1, 0.2, 0.3, 0.9, 0.8, 0.7), start=1):
            proxy.start()
            manager.observe({"loss": loss}, step=step, epoch=0, epoch_end=False)
        assert Counter(SMALL_SAVE) + Counter({"list": 1}) == proxy.kinds


def test_a_save_costs_no_more_requests_when_there_are_many_checkpoints(server: Server, proxy: CountingProxy) -> None:
    """A save needs at most 20 requests."""
    url, options = server.fresh(), server.storage_options
    counts = []
    with CheckpointManager(
        url, Policy(EverySteps(1), [KeepAll()]), state=lambda: {"w": 1}, storage_options=options
    ) as manager:
        for step in range(1, 31):
            proxy.start()
            manager.observe({}, step=step, epoch=0, epoch_end=False)
            counts.append(proxy.kinds.total())

    assert counts[1:2] * 28 == counts[2:]
    assert counts[1] <= 20


def test_opening_costs_one_listing_and_one_read_of_the_index(server: Server, proxy: CountingProxy) -> None:
    """The number of records does not matter; without an index each record is read."""
    url, policy = server.fresh(), Policy(EverySteps(1), [KeepAll()])
    storage = open_storage(url, new_owner(), server.storage_options)
    assert isinstance(storage, FsspecStorage)
    files: dict[str, bytes] = {}
    for step in range(1, 101):
        entry = Entry(record=record(f"s{step}.ckpt", step=step, size=0))
        files |= {f".checkpointer/records/s{step}.ckpt.json": entry.to_json(), f"s{step}.ckpt": b""}
    root = f"{url}/".removeprefix("s3://")
    storage._connection.fs.pipe({root + path: data for path, data in files.items()}, batch_size=16)

    def opened(**kwargs: Any) -> int:
        proxy.start()
        with CheckpointManager(url, policy, storage_options=server.storage_options, **kwargs) as manager:
            assert 100 == len(manager.records)
        return proxy.kinds.total()

    assert opened() >= 100
    opened(state=dict)
    assert opened() <= 5
    assert 1 == proxy.kinds["list"]


def test_the_mark_of_a_writer_costs_a_put_and_a_delete(server: Server, proxy: CountingProxy) -> None:
    """It is written when the directory is opened, and deleted when it is closed."""
    url, options = server.fresh(), server.storage_options
    with CheckpointManager(url, Policy(EverySteps(1), [KeepAll()]), state=dict, storage_options=options) as manager:
        manager.observe({}, step=1, epoch=0)
    storage = open_storage(url, new_owner(), options)
    proxy.start()
    mark(storage, "me")
    assert {"PUT": 1} == proxy.kinds
    proxy.start()
    unmark(storage, "me")
    assert 1 == proxy.kinds["DELETE"]
    assert proxy.kinds.total() <= 3


def test_opening_many_records_costs_a_request_per_1000_and_one_read(server: Server, proxy: CountingProxy) -> None:
    """Records need no request of their own. There are 10 000 of them, or a tenth of that for `sampling`."""
    count = 10_000 if EVERY == 1 else 1000
    url = server.fresh()
    storage = open_storage(url, new_owner(), server.storage_options)
    assert isinstance(storage, S3Storage)
    entries = [Entry(record=record(f"s{step}.ckpt", step=step)) for step in range(1, count + 1)]
    by_path = {index.record_path(entry.record.name): entry for entry in entries}
    root = f"{url}/".removeprefix("s3://")
    files = {root + path: entry.to_json() for path, entry in by_path.items()}
    files |= {root + entry.record.name: bytes(entry.record.size) for entry in entries}
    storage._connection.fs.pipe(files, batch_size=32)
    index.save(storage, index.Listing(entries=by_path, damaged={}, files=storage.list()))
    proxy.start()
    with CheckpointManager(url, storage_options=server.storage_options) as manager:
        assert count == len(manager.session.manifest.records)

    # Records, payloads and the index together are one object more than a multiple of 1000.
    assert {"list": 2 * count // 1000 + 1, "HEAD": 1, "GET": 1} == proxy.kinds


class PairingProxy(CountingProxy):
    """Forwards a DELETE once another one has come."""

    def __init__(self, upstream: int) -> None:
        super().__init__(upstream)
        self.pair = threading.Barrier(2, timeout=10)

    def strikes(self, *, head: bytes) -> None:
        super().strikes(head=head)
        if head.startswith(b"DELETE"):
            with contextlib.suppress(threading.BrokenBarrierError):
                self.pair.wait()


def test_the_files_of_a_folder_are_deleted_several_at_a_time(serve: Serve) -> None:
    """A folder has a file of each rank: one after the other, thousands of them would take minutes."""
    server = serve("s3")
    with (proxy := PairingProxy(server.port)):
        through = attrs.evolve(server, port=proxy.port)
        storage = open_storage(through.fresh(), new_owner(), through.storage_options)
        for number in range(4):
            storage.write(f"step=1.dcp/__{number}_0.distcp", b"shard")
        storage.delete("step=1.dcp")
        assert 4 == proxy.kinds["DELETE"]
        assert not proxy.pair.broken
        assert {} == storage.list()


def test_unfinished_uploads_of_dead_writers_are_swept(server: Server) -> None:
    """The server keeps their parts, and charges for them, until they are aborted."""
    url, options = server.fresh(), server.storage_options
    owner = new_owner()
    dead, other = (open_storage(url, each, options) for each in (owner, new_owner()))
    assert isinstance(dead, S3Storage)
    assert isinstance(other, S3Storage)
    uploads = [storage.upload("a.ckpt") for storage in (dead, other)]
    for upload in uploads:
        upload.write(bytes(33 * MIB))

    def unfinished() -> int:
        key = dead._connection.key("a.ckpt")
        return len(dead._connection.call("list_multipart_uploads", Prefix=key).get("Uploads", ()))

    assert 2 == unfinished()
    other.sweep()
    assert 2 == unfinished()
    die(owner)
    other.sweep()
    assert 1 == unfinished()
    uploads[1].finish()
    uploads[1].publish(replace=False)
    assert {"a.ckpt": 33 * MIB} == {path: stat.size for path, stat in other.list("a.ckpt").items()}
    assert 0 == unfinished()


@pytest.mark.parametrize("name", ["s3", "rclone"])
def test_an_upload_is_whole_or_not_there_if_another_process_discards_it_meanwhile(serve: Serve, name: str) -> None:
    """If its writer gets no error, it is there."""
    server = serve(name)
    url, options = server.fresh(), server.storage_options
    owner, ended = "node1_0000_1~1~1~000000000000", Counter[bool]()
    writer, other = (open_storage(url, each, options) for each in (owner, new_owner()))
    assert isinstance(writer, S3Storage)
    assert isinstance(other, S3Storage)
    with ThreadPoolExecutor(1) as beside:
        for number in range(-4, 26):
            path, content = f"{number}.ckpt", bytes([number % 256]) * 100_000
            with aborting(_Multipart(writer._connection, writer._publisher, path)) as upload:
                upload.write(content)
                upload.finish()
                discarding = beside.submit(other.discard, owner)
                if number < 0:
                    discarding.result()
                time.sleep(max(0, number) / 1000)
                try:
                    upload.publish(replace=True)
                except OSError:
                    is_published = False
                else:
                    is_published = True
                discarding.result()
            # rclone may put the object in its place, and report an error then.
            if is_published or other.list(path):
                assert content == read_whole(functools.partial(other.open, path), len(content) + 1)
            ended[is_published] += 1
    assert ended[False] >= 4
    assert ended[True], "each of them was discarded first"
    assert 30 == sum(ended.values())


def test_a_second_storage_reads_no_description_of_the_service_again(serve: Serve) -> None:
    """Botocore's descriptions of S3 are files of a megabyte, whose parsing takes a tenth of a second."""
    server = serve("s3")
    read: list[str] = []

    def note(event: str, args: Any) -> None:
        if event == "open" and isinstance(args[0], str) and "/botocore/data/" in args[0]:
            read.append(args[0])

    def use() -> None:
        open_storage(server.fresh(), new_owner(), server.storage_options).write("a", b"1")

    use()
    sys.addaudithook(note)
    use()
    assert [] == read
