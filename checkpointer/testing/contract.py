"""Each promise of `checkpointer.ports.Storage` and its optional ports as a test. Subclass it for your storage."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import unittest
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkpointer.ports import (
    Storage,
    SupportsCopy,
    SupportsFreeSpace,
    SupportsLinks,
    SupportsPaths,
    SupportsScratch,
    SupportsSweep,
    Upload,
)

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
"""File names that metrics and users produce; two have 240 bytes."""


class StorageContract:
    """Subclass it, override `make_storage`, and let pytest collect the subclass.

    Tests of a port that your storage does not support are skipped, and name the port. For readable failures call
    ``pytest.register_assert_rewrite("checkpointer.testing.contract")`` before the import.

    Example:
        >>> from checkpointer.testing import MemoryStorage, StorageContract
        >>> class TestMine(StorageContract):
        ...     def make_storage(self):
        ...         return MemoryStorage()
        >>> TestMine().test_write_replaces_the_whole_file()
    """

    def make_storage(self) -> Storage:
        """Return a new, empty storage at each call.

        Raises:
            NotImplementedError: Until you override it.
        """
        msg = f"{type(self).__name__} must override make_storage() to return an empty storage"
        raise NotImplementedError(msg)

    # list

    def test_an_empty_storage_lists_nothing(self) -> None:
        """A listing without files is empty, and not an error."""
        storage = self.make_storage()
        for prefix in ("", "missing", "missing/below"):
            assert {} == dict(storage.list(prefix))

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
        """Quick rewrites of one size never repeat a version, unless ``modified_s`` says that they may."""
        storage = self.make_storage()
        seen = []
        for number in range(24):
            if number < 12:
                storage.write("a", b"%02d" % number)
            else:
                _put(storage, "a", b"%02d" % number, replace=True)
            seen.append(storage.list("a")["a"])

        versions = [stat.version for stat in seen if stat.version and stat.modified_s is None]
        assert len(versions) == len(set(versions)), versions

    def test_the_version_stays_while_the_file_does(self) -> None:
        """A file that is not rewritten keeps its version when other files change."""
        storage = self.make_storage()
        storage.write("a", b"1")
        before = storage.list()["a"]
        storage.write("b", b"2")
        _read(storage, "a")

        assert before == storage.list("a")["a"]

    # open

    def test_opening_what_is_missing_raises_file_not_found(self) -> None:
        """So it does below a missing folder, and below a file."""
        storage = self.make_storage()
        storage.write("file", b"1")

        for path in ("missing", "missing/below", "file/below"):
            with _raises(FileNotFoundError), storage.open(path):
                pass

    def test_an_open_file_is_seekable(self) -> None:
        """Some payload formats read the end first."""
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
        """A shorter content keeps nothing of a longer one; an empty file exists too."""
        storage = self.make_storage()

        for data in (b"long content", b"short", b""):
            storage.write("folder/a", data)
            assert data == _read(storage, "folder/a")
            assert {"folder/a": len(data)} == _sizes(storage)

    def test_a_write_that_cannot_be_is_an_os_error(self) -> None:
        """A write below a file may fail or succeed; the file stays as it is."""
        storage = self.make_storage()
        storage.write("file", b"1")

        with contextlib.suppress(OSError):
            storage.write("file/below", b"2")

        assert b"1" == _read(storage, "file")

    def test_any_name_can_be_written_published_listed_read_and_deleted(self) -> None:
        """Spaces, other alphabets, 240 bytes, slashes, and the special characters of shells and globs."""
        storage = self.make_storage()
        left = {*NAMES, *("up/" + name for name in NAMES)}
        for name in NAMES:
            storage.write(name, name.encode())
            _put(storage, "up/" + name, name.encode())

        assert left == set(storage.list())
        for name in NAMES:
            assert name.encode() == _read(storage, name) == _read(storage, "up/" + name)
            storage.delete(name)
            storage.delete("up/" + name)
            left -= {name, "up/" + name}
            assert left == set(storage.list()), name

    # delete

    def test_delete_removes_a_file_or_folder_and_only_that(self) -> None:
        """Names that begin with its name stay; deleting a missing path succeeds."""
        storage = self.make_storage()
        for name in ("a", "ab", "c/a", "c/ab", "tree/x", "tree/y/z", "tree2/x"):
            storage.write(name, b"1")

        for path in ("a", "a", "c/a", "tree", "tree", "missing", "missing/below", "ab/below-a-file"):
            storage.delete(path)

        assert {"ab", "c/ab", "tree2/x"} == set(storage.list())

    def test_a_deleted_name_can_be_used_again(self) -> None:
        """A file can follow a folder of its name, and a folder can follow a file."""
        storage = self.make_storage()
        storage.write("a/x", b"1")
        for path in ("a", "a/x"):
            storage.delete("a")
            _put(storage, path, b"2")
            assert b"2" == _read(storage, path)

    # upload

    def test_an_upload_is_invisible_until_published(self) -> None:
        """At each step before, it is neither listed nor can be opened; right after, it is complete."""
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
        upload = _begin(storage, "a", b"new")
        assert b"old content" == _read(storage, "a")

        upload.publish(replace=True)

        assert b"new" == _read(storage, "a")
        assert {"a": 3} == _sizes(storage)

    def test_a_reader_that_was_there_first_still_reads_the_old_file(self) -> None:
        """A file that is replaced while it is open is never read as a mixture."""
        storage = self.make_storage()
        storage.write("a", b"old content")

        with storage.open("a") as stream:
            start = stream.read(3)
            _put(storage, "a", b"NEW CONTENT", replace=True)
            assert b"old content" == start + stream.read()

    def test_publish_refuses_a_taken_name_and_leaves_it(self) -> None:
        """So it does for a name that was taken after the upload began, and for the name of a folder."""
        storage = self.make_storage()
        storage.write("folder/x", b"theirs")
        for name in ("a", "folder"):
            upload = _begin(storage, name, b"ours")
            if name == "a":
                storage.write("a", b"theirs")
            with _raises(FileExistsError):
                upload.publish(replace=False)
            upload.abort()

        assert {"a": 6, "folder/x": 6} == _sizes(storage)
        assert b"theirs" == _read(storage, "a") == _read(storage, "folder/x")

    def test_abort_leaves_nothing(self) -> None:
        """At any step before publishing, and when called twice; a file of that name stays."""
        storage = self.make_storage()
        storage.write("old", b"old")
        for path, num_steps in itertools.product(("folder/a", "old"), range(3)):
            upload = storage.upload(path)
            if num_steps > 0:
                upload.write(b"payload")
            if num_steps > 1:
                upload.finish()
            upload.abort()
            upload.abort()

            assert {"old": 3} == _sizes(storage)
            assert not _is_there(storage, "folder/a")
            assert b"old" == _read(storage, "old")

    def test_abort_after_publish_does_nothing(self) -> None:
        """Therefore it can be called in a ``finally``. With ``replace`` the name may be free."""
        storage = self.make_storage()
        for path, replace in (("a", False), ("a", True), ("b", True)):
            upload = _begin(storage, path, b"payload")
            upload.publish(replace=replace)
            upload.abort()
            upload.abort()

            assert b"payload" == _read(storage, path)

    def test_two_uploads_of_one_name_do_not_mix(self) -> None:
        """The first to publish gets the name; the other is refused."""
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
        """The writer whose `publish` succeeds has its content there; all others are refused."""
        storage = self.make_storage()
        for attempt in range(3):
            path = f"deep/{attempt}"
            contents = [b"%d" % number * 1000 for number in range(4)]
            uploads = [_begin(storage, path, data) for data in contents]
            with ThreadPoolExecutor(len(uploads)) as pool:
                outcomes = [*pool.map(_publishes, uploads)]
            for upload in uploads:
                upload.abort()

            winners = [data for won, data in zip(outcomes, contents, strict=True) if won]
            assert [_read(storage, path)] == winners, f"{len(winners)} of {len(uploads)} were published"

    def test_a_large_payload_in_odd_chunks_arrives_whole(self) -> None:
        """Five megabytes, in pieces that match no buffer's size."""
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
        """A copy reads while it writes: no reply is taken for the reply to another request, and none is missed."""
        storage = self.make_storage()
        data = bytes(range(256)) * 4096
        storage.write("other", data)
        upload = storage.upload("a")
        for _ in range(8):
            upload.write(data)
            assert {"other": len(data)} == _sizes(storage)
            assert data == _read(storage, "other")
        upload.finish()
        upload.publish(replace=False)

        with storage.open("a") as stream:
            assert all(data == stream.read(len(data)) for _ in range(8))
            assert b"" == stream.read(1)

    def test_write_takes_any_bytes_like_and_returns_its_length_in_bytes(self) -> None:
        """It writes all of it at once; a float64 counts as eight bytes."""
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
        """It has the target's present content; without a target it cannot be opened."""
        storage = _supporting(self.make_storage(), SupportsLinks)
        storage.write("deep/a", b"1")
        for path in ("link", "deep/link", "other/deep/link"):
            storage.symlink("deep/a", path)
            assert b"1" == _read(storage, path)

        storage.write("deep/a", b"new")
        assert b"new" == _read(storage, "link") == _read(storage, "deep/link") == _read(storage, "other/deep/link")
        storage.delete("deep/a")
        with _raises(FileNotFoundError), storage.open("link"):
            pass
        assert "link" in storage.list()

    def test_a_hard_link_survives_what_happens_to_its_target(self) -> None:
        """It keeps the content that the target had."""
        storage = _supporting(self.make_storage(), SupportsLinks)
        storage.write("a", b"1")
        storage.hardlink("a", "deep/link")
        assert {"a": 1, "deep/link": 1} == _sizes(storage)

        _put(storage, "a", b"new", replace=True)
        assert (b"new", b"1") == (_read(storage, "a"), _read(storage, "deep/link"))
        storage.delete("a")
        assert b"1" == _read(storage, "deep/link")

    def test_links_swing_over_what_is_there(self) -> None:
        """A new link replaces a file, a link of either kind, a dangling link, and the same link."""
        storage = _supporting(self.make_storage(), SupportsLinks)
        for name, data in (("a", b"1"), ("b", b"2"), ("link", b"a file")):
            storage.write(name, data)

        soft, hard = storage.symlink, storage.hardlink
        for make in (soft, hard, hard, soft, soft, hard):
            make("a", "link")
            assert b"1" == _read(storage, "link")
            make("b", "link")
            assert b"2" == _read(storage, "link")
        soft("missing", "link")
        hard("a", "link")

        assert b"1" == _read(storage, "link")
        assert {"a", "b", "link"} == set(storage.list())
        assert (b"1", b"2") == (_read(storage, "a"), _read(storage, "b"))

    def test_writing_to_a_link_replaces_the_link(self) -> None:
        """The target keeps its content."""
        storage = _supporting(self.make_storage(), SupportsLinks)
        storage.write("a", b"1")
        for make in (storage.symlink, storage.hardlink):
            make("a", "link")
            storage.write("link", b"written")
            assert (b"1", b"written") == (_read(storage, "a"), _read(storage, "link"))
            make("a", "link")
            _put(storage, "link", b"published", replace=True)
            assert (b"1", b"published") == (_read(storage, "a"), _read(storage, "link"))

    def test_a_link_takes_its_name(self) -> None:
        """Publishing without ``replace`` refuses the name of a link, dangling or not."""
        storage = _supporting(self.make_storage(), SupportsLinks)
        storage.write("a", b"1")
        for target in ("a", "missing"):
            storage.symlink(target, "link")
            with _raises(FileExistsError):
                _put(storage, "link", b"2")

        assert b"1" == _read(storage, "a")

    def test_deleting_a_link_keeps_its_target(self) -> None:
        """Links are not followed, neither to a file nor to a folder."""
        storage = _supporting(self.make_storage(), SupportsLinks)
        storage.write("folder/a", b"1")
        soft, hard = storage.symlink, storage.hardlink
        for make, target in ((soft, "folder/a"), (hard, "folder/a"), (soft, "folder")):
            make(target, "link")
            make(target, "tree/link")
            storage.delete("link")
            storage.delete("tree")
            assert {"folder/a": 1} == _sizes(storage)

    def test_listing_does_not_follow_links(self) -> None:
        """A link to a folder is one entry, so a loop ends."""
        storage = _supporting(self.make_storage(), SupportsLinks)
        storage.write("folder/a", b"1")
        storage.symlink("folder", "link")
        storage.symlink("folder", "folder/loop")

        assert {"folder/a", "folder/loop", "link"} == set(storage.list())
        assert {"link"} == set(storage.list("link"))
        assert b"1" == _read(storage, "link/a")

    def test_a_hard_link_that_cannot_be_is_an_os_error(self) -> None:
        """Such a link would lead to a folder or to a missing file; the file under its name stays."""
        storage = _supporting(self.make_storage(), SupportsLinks)
        storage.write("folder/a", b"1")
        storage.write("link", b"2")
        for target in ("folder", "missing"):
            with _raises(OSError):
                storage.hardlink(target, "link")

        assert b"2" == _read(storage, "link")
        assert {"folder/a", "link"} == set(storage.list())

    # SupportsCopy

    def test_copy_copies_a_file_over_what_is_there(self) -> None:
        """The copy is complete and independent of its source; special characters of globs have no effect."""
        storage = _supporting(self.make_storage(), SupportsCopy)
        for name, data in (("set[12]*", b"1"), ("set1", b"other"), ("deep/b", b"something longer")):
            storage.write(name, data)

        _copy(storage, "set[12]*", "deep/b")
        storage.write("set[12]*", b"new")

        assert {"set[12]*": 3, "set1": 5, "deep/b": 1} == _sizes(storage)
        assert b"1" == _read(storage, "deep/b")

    def test_copy_copies_a_folder_over_what_is_there(self) -> None:
        """A second copy gives the same result: no folder inside the folder, and no file of the former content."""
        storage = _supporting(self.make_storage(), SupportsCopy)
        for name in ("a/x", "a/y/z", "b/x", "b/more"):
            storage.write(name, name.encode())

        for source, expected in (("b", {"x", "more"}), ("a", {"x", "y/z"}), ("a", {"x", "y/z"})):
            _copy(storage, source, "to/alias")
            assert {"to/alias/" + name for name in expected} == set(storage.list("to"))
            assert f"{source}/x".encode() == _read(storage, "to/alias/x")

    def test_copying_what_is_missing_raises_file_not_found(self) -> None:
        """The file under the target's name stays."""
        storage = _supporting(self.make_storage(), SupportsCopy)
        storage.write("b", b"1")
        with _raises(FileNotFoundError):
            storage.copy("missing", "b")

        assert b"1" == _read(storage, "b")

    # SupportsScratch

    def test_a_scratch_file_is_there_and_gone(self) -> None:
        """It replaces an older one; deleting it twice is fine."""
        storage = _supporting(self.make_storage(), SupportsScratch)
        for data in (b"old", b"new"):
            storage.write_scratch("folder/scratch", data)
            assert data == _read(storage, "folder/scratch")
        for _ in range(2):
            storage.delete_scratch("folder/scratch")
            assert not storage.list("folder/scratch")

    # SupportsFreeSpace

    def test_free_space_is_a_number_of_bytes_or_unknown(self) -> None:
        """It is never negative, and has no side effect."""
        storage = _supporting(self.make_storage(), SupportsFreeSpace)
        assert (space := storage.free_space()) is None or space >= 0
        assert {} == _sizes(storage)

    # SupportsPaths

    def test_a_local_path_is_absolute_and_the_file_itself(self) -> None:
        """A file that a trainer writes at a local path is in the storage, once it is synced."""
        storage = _supporting(self.make_storage(), SupportsPaths)
        path = Path(storage.local_path("deep/a"))
        assert path.is_absolute()
        assert not path.exists()

        storage.write("deep/a", b"1")
        assert b"1" == path.read_bytes()
        path.with_name("theirs").write_bytes(b"22")
        storage.sync("deep/theirs")
        storage.sync("deep")
        assert {"deep/a": 1, "deep/theirs": 2} == _sizes(storage)
        with _raises(OSError):
            storage.sync("missing")

    def test_a_staged_file_is_invisible_until_published(self) -> None:
        """Its path is absolute, unused, different at each call, and ends with the final name."""
        storage = _supporting(self.make_storage(), SupportsPaths)
        (one, upload), (other, unused) = storage.stage("deep/a.b.ckpt"), storage.stage("deep/a.b.ckpt")
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
        """It is refused if its name is taken; `abort` removes all of it."""
        storage = _supporting(self.make_storage(), SupportsPaths)
        _fill(storage.stage("deep/tree"), b"1").publish(replace=False)
        assert {"deep/tree/x": 1, "deep/tree/y/z": 1} == _sizes(storage)

        path, _ = staged = storage.stage("deep/tree")
        upload = _fill(staged, b"22")
        with _raises(FileExistsError):
            upload.publish(replace=False)
        upload.abort()

        assert not Path(path).exists()
        assert {"deep/tree/x": 1, "deep/tree/y/z": 1} == _sizes(storage)

    def test_a_folder_over_a_folder_is_replaced_whole_or_not_at_all(self) -> None:
        """Few filesystems can do it in one step; the others raise an error and keep the old folder."""
        storage = _supporting(self.make_storage(), SupportsPaths)
        storage.write("tree/old", b"1")
        upload = _fill(storage.stage("tree"), b"22")
        expected = {"tree/x": 2, "tree/y/z": 2}
        try:
            upload.publish(replace=True)
        except OSError:
            expected = {"tree/old": 1}
        upload.abort()

        assert expected == _sizes(storage)

    def test_a_staged_path_where_nothing_was_written_cannot_be_finished(self) -> None:
        """A trainer that wrote to another path has no checkpoint."""
        storage = _supporting(self.make_storage(), SupportsPaths)
        _, upload = storage.stage("a")
        with _raises(OSError):
            upload.finish()
        upload.abort()

        assert {} == _sizes(storage)

    # SupportsSweep

    def test_sweep_keeps_what_this_writer_has_begun(self) -> None:
        """A live writer's uploads stay as they are."""
        storage = _supporting(self.make_storage(), SupportsSweep)
        storage.prepare()
        storage.prepare()
        upload = storage.upload("a")
        upload.write(b"pay")
        assert 0 == storage.sweep()
        upload.write(b"load")
        upload.finish()
        assert 0 == storage.sweep()
        upload.publish(replace=False)

        assert b"payload" == _read(storage, "a")

    def test_prepare_sweep_and_close_show_no_files(self) -> None:
        """The staging area is not listed, published files stay, and each call can be repeated."""
        storage = _supporting(self.make_storage(), SupportsSweep)
        storage.close()
        storage.prepare()
        assert {} == _sizes(storage)
        storage.write("a", b"1")
        storage.sweep()
        storage.close()
        storage.close()

        assert {"a": 1} == _sizes(storage)


_raises = unittest.TestCase().assertRaises


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


def _begin(storage: Storage, path: str, data: bytes) -> Upload:
    upload = storage.upload(path)
    upload.write(data)
    upload.finish()
    return upload


def _put(storage: Storage, path: str, data: bytes, *, replace: bool = False) -> None:
    upload = _begin(storage, path, data)
    try:
        upload.publish(replace=replace)
    finally:
        upload.abort()


def _publishes(upload: Upload) -> bool:
    try:
        upload.publish(replace=False)
    except FileExistsError:
        return False
    return True


def _fill(staged: tuple[str, Upload], data: bytes) -> Upload:
    path, upload = staged
    Path(path, "y").mkdir(parents=True)
    Path(path, "x").write_bytes(data)
    Path(path, "y", "z").write_bytes(data)
    upload.finish()
    return upload


def _copy(storage: SupportsCopy, source: str, path: str) -> None:
    try:
        storage.copy(source, path)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        raise unittest.SkipTest(str(error)) from error


def _supporting(storage: Storage, port: type) -> Any:
    """Return the storage, or skip the test if it does not support the port."""
    if not isinstance(storage, port):
        msg = f"{type(storage).__name__} does not support {port.__name__}"
        raise unittest.SkipTest(msg)
    return storage
