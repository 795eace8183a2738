"""Every promise of `checkpointer.ports.Storage` and its optional ports as a test: subclass it for your storage."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from checkpointer.ports import (
    Storage,
    SupportsCopy,
    SupportsFreeSpace,
    SupportsLinks,
    SupportsPaths,
    SupportsSweep,
    Upload,
)

__all__ = ["StorageContract"]

P = TypeVar("P")

NAMES = (
    "plain.ckpt",
    "no extension",
    "epoch=01-val_loss=-0.25.ckpt",
    "a/b/c/deep.ckpt",
    "größe-模型-🚀.ckpt",
    "é" * 120,
    "n" * 240,
    ".hidden",
    "hash#percent%20.ckpt",
    "quote'and\"and$HOME.ckpt",
    "star*.ckpt",
    "which?.ckpt",
    "set[12].ckpt",
    "set1.ckpt",
)
"""File names that metrics and users produce; two are 240 bytes long."""


class StorageContract:
    """Subclass it, say how to make your storage, and let pytest collect the subclass.

    The ports that your storage does not support are skipped by name. For readable failures call
    ``pytest.register_assert_rewrite("checkpointer.testing.contract")`` before the import.

    Example:
        >>> from checkpointer.testing import MemoryStorage, StorageContract
        >>> class TestMine(StorageContract):
        ...     def make_storage(self):
        ...         return MemoryStorage()
        >>> TestMine().test_write_replaces_the_whole_file()
    """

    def make_storage(self) -> Storage:
        """Return an empty storage, another one each time.

        Raises:
            NotImplementedError: Until you override it.
        """
        msg = f"{type(self).__name__} must override make_storage() to return an empty storage"
        raise NotImplementedError(msg)

    # list

    def test_an_empty_storage_lists_nothing(self) -> None:
        """Nothing is there at first, and listing does not fail for it."""
        storage = self.make_storage()

        assert {} == dict(storage.list())
        assert {} == dict(storage.list("missing"))
        assert {} == dict(storage.list("missing/below"))

    def test_list_returns_files_below_a_prefix_with_their_size(self) -> None:
        """A prefix is a folder or a file, not the beginning of a name."""
        storage = self.make_storage()
        for name in ("a/x", "a/y/z", "ab", "a.b/c"):
            storage.write(name, name.encode())

        assert {"a/x": 3, "a/y/z": 5, "ab": 2, "a.b/c": 5} == _sizes(storage)
        assert {"a/x": 3, "a/y/z": 5} == _sizes(storage, "a")
        assert {"a/y/z": 5} == _sizes(storage, "a/y")
        assert {"ab": 2} == _sizes(storage, "ab")
        assert {} == _sizes(storage, "ab/below-a-file")

    def test_the_version_changes_whenever_a_file_is_rewritten(self) -> None:
        """Other contents of one size, in quick succession, never show a version that was shown before, or admit it."""
        storage = self.make_storage()
        seen = []
        for number in range(12):
            storage.write("a", b"%02d" % number)
            seen.append(storage.list("a")["a"])
        for number in range(12, 24):
            _put(storage, "a", b"%02d" % number, replace=True)
            seen.append(storage.list("a")["a"])

        versions = [stat.version for stat in seen if stat.version and stat.modified_s is None]
        assert len(versions) == len(set(versions)), versions

    def test_the_version_stays_while_the_file_does(self) -> None:
        """What was not rewritten keeps its version, whatever is done next to it."""
        storage = self.make_storage()
        storage.write("a", b"1")
        before = storage.list()["a"]
        storage.write("b", b"2")
        _read(storage, "a")

        assert before == storage.list("a")["a"]

    # open

    def test_opening_what_is_missing_raises_file_not_found(self) -> None:
        """Also below a missing folder, and below a file."""
        storage = self.make_storage()
        storage.write("file", b"1")

        for path in ("missing", "missing/below", "file/below"):
            with _raises(FileNotFoundError), storage.open(path):
                pass

    def test_an_open_file_is_seekable(self) -> None:
        """Payload formats read from the end first."""
        storage = self.make_storage()
        storage.write("a", b"0123456789")

        with storage.open("a") as stream:
            assert stream.seekable()
            stream.seek(-3, os.SEEK_END)
            assert b"789" == stream.read()
            stream.seek(2)
            assert b"23" == stream.read(2)
            assert 4 == stream.tell()

    # write

    def test_write_replaces_the_whole_file(self) -> None:
        """A shorter content leaves nothing of a longer one; an empty one is a file too."""
        storage = self.make_storage()

        for data in (b"long content", b"short", b""):
            storage.write("folder/a", data)
            assert data == _read(storage, "folder/a")
            assert {"folder/a": len(data)} == _sizes(storage)

    def test_a_write_that_cannot_be_is_an_os_error(self) -> None:
        """Below a file there is no room, or there is; a file that was there stays as it is."""
        storage = self.make_storage()
        storage.write("file", b"1")

        with contextlib.suppress(OSError):
            storage.write("file/below", b"2")

        assert b"1" == _read(storage, "file")

    def test_any_name_can_be_written_published_listed_read_and_deleted(self) -> None:
        """Spaces, other alphabets, 240 bytes, slashes, and what shells and globs find special."""
        storage = self.make_storage()
        for name in NAMES:
            storage.write(name, name.encode())
        for name in NAMES:
            _put(storage, "up/" + name, name.encode())

        assert {*NAMES, *("up/" + name for name in NAMES)} == set(storage.list())
        for number, name in enumerate(NAMES):
            assert name.encode() == _read(storage, name) == _read(storage, "up/" + name)
            storage.delete(name)
            storage.delete("up/" + name)
            left = NAMES[number + 1 :]
            assert {*left, *("up/" + other for other in left)} == set(storage.list()), name

    # delete

    def test_delete_removes_a_file_and_only_that(self) -> None:
        """Names that begin with its name stay; what is not there is deleted already."""
        storage = self.make_storage()
        for name in ("a", "ab", "c/a", "c/ab"):
            storage.write(name, b"1")

        for path in ("a", "a", "c/a", "missing", "missing/below", "ab/below-a-file"):
            storage.delete(path)

        assert {"ab", "c/ab"} == set(storage.list())

    def test_delete_removes_a_whole_folder(self) -> None:
        """With everything in it, and nothing beside it; twice does no harm."""
        storage = self.make_storage()
        for name in ("a/x", "a/y/z", "a/y/w", "ab/x", "b"):
            storage.write(name, b"1")

        storage.delete("a")
        storage.delete("a")

        assert {"ab/x", "b"} == set(storage.list())

    def test_a_deleted_name_can_be_used_again(self) -> None:
        """For a file where a folder was, and the other way around."""
        storage = self.make_storage()
        storage.write("a/x", b"1")
        storage.delete("a")
        _put(storage, "a", b"2")
        assert b"2" == _read(storage, "a")

        storage.delete("a")
        _put(storage, "a/x", b"3")
        assert b"3" == _read(storage, "a/x")

    # upload

    def test_an_upload_is_invisible_until_published(self) -> None:
        """Neither listed nor there to open, at any step before; and whole right after."""
        storage = self.make_storage()
        upload = storage.upload("folder/a")
        assert not _is_there(storage, "folder/a")
        upload.write(b"payload")
        assert not _is_there(storage, "folder/a")
        upload.finish()
        assert not _is_there(storage, "folder/a")

        upload.publish(replace=False)

        assert b"payload" == _read(storage, "folder/a")
        assert {"folder/a": 7} == _sizes(storage)

    def test_the_old_file_is_read_until_its_replacement_is_published(self) -> None:
        """A reader sees the old file or the new one."""
        storage = self.make_storage()
        storage.write("a", b"old content")
        upload = storage.upload("a")
        upload.write(b"new")
        upload.finish()
        assert b"old content" == _read(storage, "a")

        upload.publish(replace=True)

        assert b"new" == _read(storage, "a")
        assert {"a": 3} == _sizes(storage)

    def test_a_reader_that_was_there_first_still_reads_the_old_file(self) -> None:
        """What is open when it is replaced or deleted is never a mixture."""
        storage = self.make_storage()
        storage.write("a", b"old content")

        with storage.open("a") as stream:
            start = stream.read(3)
            _put(storage, "a", b"NEW CONTENT", replace=True)
            assert b"old content" == start + stream.read()

    def test_publish_can_replace_what_is_not_there(self) -> None:
        """Replacing is allowed, not demanded."""
        storage = self.make_storage()

        _put(storage, "a", b"1", replace=True)

        assert b"1" == _read(storage, "a")

    def test_publish_refuses_a_taken_name_and_leaves_it(self) -> None:
        """Also one that was taken after the upload began, and one that a folder has."""
        storage = self.make_storage()
        storage.write("folder/x", b"theirs")
        for name in ("a", "folder"):
            upload = storage.upload(name)
            upload.write(b"ours")
            upload.finish()
            if name == "a":
                storage.write("a", b"theirs")
            with _raises(FileExistsError):
                upload.publish(replace=False)
            upload.abort()

        assert {"a": 6, "folder/x": 6} == _sizes(storage)
        assert b"theirs" == _read(storage, "a") == _read(storage, "folder/x")

    def test_abort_leaves_nothing(self) -> None:
        """At any step before publishing, and twice."""
        storage = self.make_storage()
        for num_steps in range(3):
            upload = storage.upload("folder/a")
            if num_steps > 0:
                upload.write(b"payload")
            if num_steps > 1:
                upload.finish()
            upload.abort()
            upload.abort()

            assert {} == _sizes(storage)
            assert not _is_there(storage, "folder/a")

    def test_abort_keeps_what_is_under_the_name(self) -> None:
        """An aborted replacement was never there."""
        storage = self.make_storage()
        storage.write("a", b"old")
        upload = storage.upload("a")
        upload.write(b"new")
        upload.abort()

        assert b"old" == _read(storage, "a")

    def test_abort_after_publish_does_nothing(self) -> None:
        """So that it can stand in a ``finally``."""
        storage = self.make_storage()
        for replace in (False, True):
            upload = storage.upload("a")
            upload.write(b"payload")
            upload.finish()
            upload.publish(replace=replace)
            upload.abort()
            upload.abort()

            assert b"payload" == _read(storage, "a")

    def test_two_uploads_of_one_name_do_not_mix(self) -> None:
        """The first to publish has it; the other is refused."""
        storage = self.make_storage()
        first, second = storage.upload("a"), storage.upload("a")
        for upload, data in ((first, b"111"), (second, b"2"), (first, b"111")):
            upload.write(data)
        for upload in (first, second):
            upload.finish()
        first.publish(replace=False)
        with _raises(FileExistsError):
            second.publish(replace=False)
        second.abort()

        assert b"111111" == _read(storage, "a")

    def test_of_many_writers_of_one_name_one_wins(self) -> None:
        """Whoever is told that it was published has its content there; all others are refused."""
        storage = self.make_storage()
        for attempt in range(3):
            path = f"deep/{attempt}"
            uploads = [(storage.upload(path), b"%d" % number * 1000) for number in range(4)]
            for upload, data in uploads:
                upload.write(data)
                upload.finish()
            with ThreadPoolExecutor(len(uploads)) as pool:
                outcomes = [*pool.map(_publishes, (upload for upload, _ in uploads))]
            for upload, _ in uploads:
                upload.abort()

            winners = [data for won, (_, data) in zip(outcomes, uploads, strict=True) if won]
            assert [_read(storage, path)] == winners, f"{len(winners)} of {len(uploads)} were published"

    def test_a_large_payload_in_odd_chunks_arrives_whole(self) -> None:
        """Five megabytes, in pieces that fit no buffer."""
        storage = self.make_storage()
        payload = random.Random(0).randbytes(5_000_000)
        upload = storage.upload("a")
        position, size = 0, 1
        while position < len(payload):
            position += upload.write(payload[position : position + size])
            size = size * 3 % 700_001
        upload.finish()
        upload.publish(replace=False)

        assert payload == _read(storage, "a"), "the bytes differ"
        assert {"a": len(payload)} == _sizes(storage)

    def test_an_upload_goes_on_while_other_requests_are_made(self) -> None:
        """As a copy does, which reads in turn with it: no answer is taken for another's, and none is waited for."""
        storage = self.make_storage()
        data = bytes(range(256)) * 4096
        storage.write("other", data)
        upload = storage.upload("a")
        for _ in range(8):
            upload.write(data)
            assert {"other": len(data)} == _sizes(storage)
            with storage.open("other") as stream:
                assert data == stream.read()
        upload.finish()
        upload.publish(replace=False)

        with storage.open("a") as stream:
            assert all(data == stream.read(len(data)) for _ in range(8))
            assert b"" == stream.read(1)

    def test_write_takes_any_bytes_like_and_returns_its_length_in_bytes(self) -> None:
        """All of it at once; eight bytes per float64, not one."""
        storage = self.make_storage()
        numbers = array("d", [1.0, 2.0])
        upload = storage.upload("a")
        assert [2, 3, 2, 16, 0] == [
            upload.write(data) for data in (b"ab", bytearray(b"cde"), memoryview(b"fg"), numbers, b"")
        ]
        upload.finish()
        upload.publish(replace=False)

        assert b"abcdefg" + numbers.tobytes() == _read(storage, "a")

    # SupportsLinks

    def test_a_symlink_follows_its_target(self) -> None:
        """It shows what the target is now; without a target it is missing."""
        storage = self.make_storage()
        links = _port(storage, SupportsLinks)
        storage.write("deep/a", b"1")
        for path in ("link", "deep/link", "other/deep/link"):
            links.symlink("deep/a", path)
            assert b"1" == _read(storage, path)

        storage.write("deep/a", b"new")
        assert b"new" == _read(storage, "link") == _read(storage, "deep/link") == _read(storage, "other/deep/link")
        storage.delete("deep/a")
        with _raises(FileNotFoundError), storage.open("link"):
            pass
        assert "link" in storage.list()

    def test_a_hard_link_survives_what_happens_to_its_target(self) -> None:
        """It keeps the content that it was made for."""
        storage = self.make_storage()
        links = _port(storage, SupportsLinks)
        storage.write("a", b"1")
        links.hardlink("a", "deep/link")
        assert {"a": 1, "deep/link": 1} == _sizes(storage)

        _put(storage, "a", b"new", replace=True)
        assert (b"new", b"1") == (_read(storage, "a"), _read(storage, "deep/link"))
        storage.delete("a")
        assert b"1" == _read(storage, "deep/link")

    def test_links_swing_over_what_is_there(self) -> None:
        """A file, a link of either kind, a dangling one, and the same one again."""
        storage = self.make_storage()
        links = _port(storage, SupportsLinks)
        storage.write("a", b"1")
        storage.write("b", b"2")
        storage.write("link", b"a file")

        for make in (links.symlink, links.hardlink, links.hardlink, links.symlink, links.symlink, links.hardlink):
            make("a", "link")
            assert b"1" == _read(storage, "link")
            make("b", "link")
            assert b"2" == _read(storage, "link")
        links.symlink("missing", "link")
        links.hardlink("a", "link")

        assert b"1" == _read(storage, "link")
        assert {"a", "b", "link"} == set(storage.list())
        assert (b"1", b"2") == (_read(storage, "a"), _read(storage, "b"))

    def test_writing_to_a_link_replaces_the_link(self) -> None:
        """The target is not written through it."""
        storage = self.make_storage()
        links = _port(storage, SupportsLinks)
        storage.write("a", b"1")
        for make in (links.symlink, links.hardlink):
            make("a", "link")
            storage.write("link", b"written")
            assert (b"1", b"written") == (_read(storage, "a"), _read(storage, "link"))
            make("a", "link")
            _put(storage, "link", b"published", replace=True)
            assert (b"1", b"published") == (_read(storage, "a"), _read(storage, "link"))

    def test_a_link_takes_its_name(self) -> None:
        """Publishing without ``replace`` refuses it, dangling or not."""
        storage = self.make_storage()
        links = _port(storage, SupportsLinks)
        storage.write("a", b"1")
        for target in ("a", "missing"):
            links.symlink(target, "link")
            with _raises(FileExistsError):
                _put(storage, "link", b"2")

        assert b"1" == _read(storage, "a")

    def test_deleting_a_link_keeps_its_target(self) -> None:
        """Links are not followed: neither to a file nor to a folder."""
        storage = self.make_storage()
        links = _port(storage, SupportsLinks)
        storage.write("folder/a", b"1")
        for make, target in ((links.symlink, "folder/a"), (links.hardlink, "folder/a"), (links.symlink, "folder")):
            make(target, "link")
            make(target, "tree/link")
            storage.delete("link")
            storage.delete("tree")
            assert {"folder/a": 1} == _sizes(storage)

    def test_listing_does_not_follow_links(self) -> None:
        """A link to a folder is one entry, and a loop is no trap."""
        storage = self.make_storage()
        links = _port(storage, SupportsLinks)
        storage.write("folder/a", b"1")
        links.symlink("folder", "link")
        links.symlink("folder", "folder/loop")

        assert {"folder/a", "folder/loop", "link"} == set(storage.list())
        assert {"link"} == set(storage.list("link"))
        assert b"1" == _read(storage, "link/a")

    def test_a_hard_link_that_cannot_be_is_an_os_error(self) -> None:
        """To a folder or to nothing; what is under the name stays."""
        storage = self.make_storage()
        links = _port(storage, SupportsLinks)
        storage.write("folder/a", b"1")
        storage.write("link", b"2")
        for target in ("folder", "missing"):
            with _raises(OSError):
                links.hardlink(target, "link")

        assert b"2" == _read(storage, "link")
        assert {"folder/a", "link"} == set(storage.list())

    # SupportsCopy

    def test_copy_copies_a_file_over_what_is_there(self) -> None:
        """Whole, and independent of its source; globs mean nothing."""
        storage = self.make_storage()
        copies = _port(storage, SupportsCopy)
        storage.write("set[12]*", b"1")
        storage.write("set1", b"other")
        storage.write("deep/b", b"something longer")

        with _if_able():
            copies.copy("set[12]*", "deep/b")
        storage.write("set[12]*", b"new")

        assert {"set[12]*": 3, "set1": 5, "deep/b": 1} == _sizes(storage)
        assert b"1" == _read(storage, "deep/b")

    def test_copy_copies_a_folder_over_what_is_there(self) -> None:
        """Twice gives the same: not a folder in the folder, and no file of the one before."""
        storage = self.make_storage()
        copies = _port(storage, SupportsCopy)
        for name in ("a/x", "a/y/z", "b/x", "b/more"):
            storage.write(name, name.encode())

        for source, expected in (("b", {"x", "more"}), ("a", {"x", "y/z"}), ("a", {"x", "y/z"})):
            with _if_able():
                copies.copy(source, "to/alias")
            assert {"to/alias/" + name for name in expected} == set(storage.list("to"))
            assert f"{source}/x".encode() == _read(storage, "to/alias/x")

    def test_copying_what_is_missing_raises_file_not_found(self) -> None:
        """And keeps what is under the name."""
        storage = self.make_storage()
        copies = _port(storage, SupportsCopy)
        storage.write("b", b"1")
        with _raises(FileNotFoundError):
            copies.copy("missing", "b")

        assert b"1" == _read(storage, "b")

    # SupportsFreeSpace

    def test_free_space_is_a_number_of_bytes_or_unknown(self) -> None:
        """Never negative, and without a side effect."""
        storage = self.make_storage()
        space = _port(storage, SupportsFreeSpace).free_space()

        assert space is None or space >= 0
        assert {} == _sizes(storage)

    # SupportsPaths

    def test_a_local_path_is_absolute_and_the_file_itself(self) -> None:
        """There or not; what a trainer writes there is in the storage, once synced."""
        storage = self.make_storage()
        paths = _port(storage, SupportsPaths)
        path = Path(paths.local_path("deep/a"))
        assert path.is_absolute()
        assert not path.exists()

        storage.write("deep/a", b"1")
        assert b"1" == path.read_bytes()
        path.with_name("theirs").write_bytes(b"22")
        paths.sync("deep/theirs")
        paths.sync("deep")
        assert {"deep/a": 1, "deep/theirs": 2} == _sizes(storage)

    def test_syncing_what_is_missing_is_an_os_error(self) -> None:
        """Nobody may believe that it is durable."""
        storage = self.make_storage()
        paths = _port(storage, SupportsPaths)
        with _raises(OSError):
            paths.sync("missing")

    def test_a_staged_file_is_invisible_until_published(self) -> None:
        """Its path is absolute, unused, and another one each time; it ends with the final name."""
        storage = self.make_storage()
        paths = _port(storage, SupportsPaths)
        (one, upload), (other, unused) = paths.stage("deep/a.b.ckpt"), paths.stage("deep/a.b.ckpt")
        assert one != other
        assert one.endswith("a.b.ckpt")
        assert Path(one).is_absolute()
        assert not Path(one).exists()

        Path(one).write_bytes(b"payload")
        upload.finish()
        assert {} == _sizes(storage)
        upload.publish(replace=False)
        upload.abort()
        unused.abort()

        assert {"deep/a.b.ckpt": 7} == _sizes(storage)
        assert not Path(one).exists()

    def test_a_staged_folder_is_published_whole(self) -> None:
        """And refused if its name is taken; aborting removes all of it."""
        storage = self.make_storage()
        paths = _port(storage, SupportsPaths)
        _fill(*paths.stage("deep/tree"), b"1").publish(replace=False)
        assert {"deep/tree/x": 1, "deep/tree/y/z": 1} == _sizes(storage)

        path, _ = staged = paths.stage("deep/tree")
        upload = _fill(*staged, b"22")
        with _raises(FileExistsError):
            upload.publish(replace=False)
        upload.abort()

        assert not Path(path).exists()
        assert {"deep/tree/x": 1, "deep/tree/y/z": 1} == _sizes(storage)

    def test_a_folder_over_a_folder_is_replaced_whole_or_not_at_all(self) -> None:
        """Few filesystems can do it in one step; those that cannot say so, and keep the old one."""
        storage = self.make_storage()
        paths = _port(storage, SupportsPaths)
        storage.write("tree/old", b"1")
        upload = _fill(*paths.stage("tree"), b"22")
        expected = {"tree/x": 2, "tree/y/z": 2}
        try:
            upload.publish(replace=True)
        except OSError:
            expected = {"tree/old": 1}
        upload.abort()

        assert expected == _sizes(storage)

    def test_a_staged_path_where_nothing_was_written_cannot_be_finished(self) -> None:
        """A trainer that wrote elsewhere has no checkpoint."""
        storage = self.make_storage()
        _, upload = _port(storage, SupportsPaths).stage("a")
        with _raises(OSError):
            upload.finish()
        upload.abort()

        assert {} == _sizes(storage)

    # SupportsSweep

    def test_sweep_keeps_what_this_writer_has_begun(self) -> None:
        """A live writer's uploads are never touched."""
        storage = self.make_storage()
        sweeps = _port(storage, SupportsSweep)
        sweeps.prepare()
        sweeps.prepare()
        upload = storage.upload("a")
        upload.write(b"pay")
        assert 0 == sweeps.sweep()
        upload.write(b"load")
        upload.finish()
        assert 0 == sweeps.sweep()
        upload.publish(replace=False)

        assert b"payload" == _read(storage, "a")

    def test_prepare_sweep_and_close_show_no_files(self) -> None:
        """Housekeeping is not listed, keeps what is published, and can be done twice."""
        storage = self.make_storage()
        sweeps = _port(storage, SupportsSweep)
        sweeps.close()
        sweeps.prepare()
        assert {} == _sizes(storage)
        storage.write("a", b"1")
        sweeps.sweep()
        sweeps.close()
        sweeps.close()

        assert {"a": 1} == _sizes(storage)


def _sizes(storage: Storage, prefix: str = "") -> dict[str, int]:
    return {name: stat.size for name, stat in storage.list(prefix).items()}


def _read(storage: Storage, path: str) -> bytes:
    with storage.open(path) as stream:
        return stream.read()


def _is_there(storage: Storage, path: str) -> bool:
    try:
        _read(storage, path)
    except FileNotFoundError:
        return path in storage.list()
    return True


def _put(storage: Storage, path: str, data: bytes, *, replace: bool = False) -> None:
    upload = storage.upload(path)
    try:
        upload.write(data)
        upload.finish()
        upload.publish(replace=replace)
    finally:
        upload.abort()


def _publishes(upload: Upload) -> bool:
    try:
        upload.publish(replace=False)
    except FileExistsError:
        return False
    return True


def _fill(path: str, upload: Upload, data: bytes) -> Upload:
    Path(path, "y").mkdir(parents=True)
    Path(path, "x").write_bytes(data)
    Path(path, "y", "z").write_bytes(data)
    upload.finish()
    return upload


def _port(storage: Storage, port: type[P]) -> P:
    if isinstance(storage, port):
        return storage
    import pytest

    pytest.skip(f"{type(storage).__name__} is no {port.__name__}")


@contextlib.contextmanager
def _if_able() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        import pytest

        pytest.skip(str(error))


@contextlib.contextmanager
def _raises(expected: type[Exception]) -> Iterator[None]:
    try:
        yield
    except expected:
        return
    msg = f"expected {expected.__name__}, and nothing was raised"
    raise AssertionError(msg)
