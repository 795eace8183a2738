"""Storages side by side with plain s3fs, botocore and torch: ``make bench-storage`` (needs ``make servers``).

The S3 server is SeaweedFS on this machine, so it shares the processor and the disk with what is measured: ratios
matter, not MB/s. Both sides of a ratio are measured in one process, interleaved; medians are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import botocore.session
import fsspec
import torch
from directories import records_of
from support.servers import SeaweedFS, Server, running
from support.servers.counting import CountingProxy
from table import Row, compared, show

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepBest, KeepLast, Policy
from checkpointer.ports import SupportsPieces
from checkpointer.storage import open_storage

KEEP_1 = Policy(EverySteps(1), [KeepLast(1)])
CHUNK = 4 << 20
BOTO_PART, BOTO_THREADS = 8 << 20, 10  # What boto3's upload_file takes by default.
SIDES = ("upload", "save", "put_file", "botocore")


@attrs.frozen
class Bench:
    """A server, and the same state in memory and as a file."""

    server: Server
    file: Path
    state: Mapping[str, torch.Tensor]
    repeats: int

    @property
    def fs(self) -> Any:
        return fsspec.filesystem("s3", skip_instance_cache=True, **self.server.storage_options)

    def time_each(self, sides: Mapping[str, Callable[[int], object]]) -> dict[str, float]:
        """Return each side's median in seconds; they take turns, and each begins as often as the others."""
        return {name: took for name, (took, _) in self.measure_each(sides).items()}

    def measure_each(self, sides: Mapping[str, Callable[[int], object]]) -> dict[str, tuple[float, float]]:
        """Return each side's medians in seconds, as `time_each` does, and the CPU seconds of this process."""
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        names = [*sides]
        # The first round warms up.
        for number in range(self.repeats + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                os.sync()
                start, busy = time.perf_counter(), time.process_time()
                sides[name](number)
                times[name].append((time.perf_counter() - start, time.process_time() - busy))
        medians = {
            name: [statistics.median(each) for each in zip(*found[1:], strict=True)] for name, found in times.items()
        }
        return {name: (took, busy) for name, (took, busy) in medians.items()}


@contextmanager
def prepared(gigabytes: float, repeats: int) -> Iterator[Bench]:
    """Start the server and write the file."""
    floats = int(gigabytes * 1e9) // 4
    state = {"a": torch.randn(floats // 2), "b": torch.randn(floats // 2)}
    with tempfile.TemporaryDirectory(dir=".") as folder, running(SeaweedFS, Path(folder)) as server:
        file = Path(folder, "state.pt")
        torch.save(state, file)
        yield Bench(server, file, state, repeats)


# One payload to S3, four ways


@contextmanager
def uploads(bench: Bench) -> Iterator[dict[str, Callable[[int], object]]]:
    """Give what sends the same bytes to S3, each over what it sent before."""
    url, options, fs = bench.server.fresh(), bench.server.storage_options, bench.fs
    storage = open_storage(f"{url}/upload", "", options)
    raw = f"{url}/raw".removeprefix("s3://")
    client = _boto_client(options)

    def upload(number: int) -> None:
        going = storage.upload("state.pt")
        with open(bench.file, "rb") as stream:
            while chunk := stream.read(CHUNK):
                going.write(chunk)
        going.finish()
        going.publish(replace=True)

    with CheckpointManager(f"{url}/save", KEEP_1, state=lambda: bench.state, storage_options=options) as manager:
        yield {
            "upload": upload,
            "save": lambda number: manager.observe({}, step=number + 1, epoch=0, epoch_end=False),
            "put_file": lambda number: fs.put_file(str(bench.file), f"{raw}/put_file"),
            "botocore": lambda number: _boto_upload(client, bench.file, *f"{raw}/botocore".split("/", 1)),
        }


def _boto_client(options: Mapping[str, Any]) -> Any:
    return botocore.session.get_session().create_client(
        "s3", aws_access_key_id=options["key"], aws_secret_access_key=options["secret"],
        endpoint_url=options["endpoint_url"], **options["client_kwargs"],
    )  # fmt: skip


def _boto_upload(client: Any, file: Path, bucket: str, key: str) -> None:
    """Do what boto3's ``upload_file`` does."""
    target = {"Bucket": bucket, "Key": key}
    target["UploadId"] = client.create_multipart_upload(**target)["UploadId"]

    def send(number: int) -> dict[str, Any]:
        with open(file, "rb") as stream:
            stream.seek((number - 1) * BOTO_PART)
            reply = client.upload_part(**target, PartNumber=number, Body=stream.read(BOTO_PART))
        return {"PartNumber": number, "ETag": reply["ETag"]}

    with ThreadPoolExecutor(BOTO_THREADS) as pool:
        parts = [*pool.map(send, range(1, -(-file.stat().st_size // BOTO_PART) + 1))]
    client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})


def upload_to_s3(bench: Bench) -> list[Row]:
    """Storage upload and manager save, beside s3fs and botocore."""
    with uploads(bench) as sides:
        took = bench.measure_each(sides)
    return [
        _transfer(bench, ours, took[ours], peer, took[peer], goal)
        for ours in ("upload", "save")
        for peer, goal in (("put_file", ""), ("botocore", " (goal <= 1.1 x)"))
    ]


def _transfer(
    bench: Bench, ours: str, took: tuple[float, float], peer: str, theirs: tuple[float, float], goal: str = ""
) -> Row:
    megabytes = bench.file.stat().st_size / 1e6

    def shown(each: tuple[float, float]) -> str:
        return f"{megabytes / each[0]:.0f} MB/s, {each[1]:.2f} s CPU"

    ratio = f"{took[0] / theirs[0]:.2f} x the time{goal}"
    return f"{ours} {megabytes / 1000:.2g} GB, S3", shown(took), peer, shown(theirs), ratio


# One payload from S3 into memory


@contextmanager
def downloads(bench: Bench) -> Iterator[dict[str, Callable[[int], object]]]:
    """Give what reads the same object into memory: ranges into one buffer, and the ways of others."""
    url, options, fs = bench.server.fresh(), bench.server.storage_options, bench.fs
    path, size = f"{url}/state.pt".removeprefix("s3://"), bench.file.stat().st_size
    fs.put_file(str(bench.file), path)
    storage = open_storage(url, "", options)
    assert isinstance(storage, SupportsPieces)
    client = _boto_client(options)
    buffer = memoryview(bytearray(size))
    ranges = [(start, min(start + BOTO_PART, size)) for start in range(0, size, BOTO_PART)]
    bucket, key = path.split("/", 1)

    def pieces(number: int) -> None:
        assert [*storage.read_pieces("state.pt", [(0, buffer)])]

    def stream(number: int) -> None:
        with storage.open("state.pt") as opened:
            position = 0
            while chunk := opened.read(CHUNK):
                buffer[position : position + len(chunk)] = chunk
                position += len(chunk)

    def boto(each: tuple[int, int]) -> bytes:
        reply = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={each[0]}-{each[1] - 1}")
        data: bytes = reply["Body"].read()
        return data

    sides: dict[str, Callable[[int], object]] = {
        "pieces": pieces,
        "botocore": lambda number: _in_threads(boto, ranges),
        "stream": stream,
        "cat_file": lambda number: fs.cat_file(path),
    }
    with contextlib.suppress(ImportError):
        obstore = importlib.import_module("obstore")
        store = importlib.import_module("obstore.store").S3Store(
            bucket, access_key_id=options["key"], secret_access_key=options["secret"],
            endpoint=options["endpoint_url"], region="us-east-1", virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )  # fmt: skip

        def into(each: tuple[int, int]) -> None:
            buffer[each[0] : each[1]] = memoryview(obstore.get_range(store, key, start=each[0], end=each[1]))

        sides["obstore"] = lambda number: _in_threads(into, ranges)
    yield sides


def _in_threads(do: Callable[[tuple[int, int]], object], ranges: Sequence[tuple[int, int]]) -> list[object]:
    with ThreadPoolExecutor(BOTO_THREADS) as pool:
        return [*pool.map(do, ranges)]


def download_from_s3(bench: Bench) -> list[Row]:
    """Read a payload in pieces, beside each other way; `stream` is what a restore did before there were pieces."""
    with downloads(bench) as sides:
        took = bench.measure_each(sides)
    peers = [peer for peer in took if peer != "pieces"]
    goals = {"botocore": " (goal <= 1.1 x)"}
    return [_transfer(bench, "pieces", took["pieces"], peer, took[peer], goals.get(peer, "")) for peer in peers]


def memory_of_uploads(bench: Bench) -> list[Row]:
    """Peak memory that each of them adds, in a process of its own."""
    extra = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--memory-of", side, str(bench.server.port), str(bench.file)]
        extra[side] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return [
        (f"extra memory of {ours}", f"{extra[ours]:.0f} MB", peer, f"{extra[peer]:.0f} MB", "-")
        for ours, peer in (("upload", "put_file"), ("save", "botocore"))
    ]


def memory_of_restore(bench: Bench) -> list[Row]:
    """Peak memory that a restore from S3 adds beside the tensors, in a process of its own."""
    url, options = bench.server.fresh(), bench.server.storage_options
    with CheckpointManager(url, KEEP_1, state=lambda: bench.state, storage_options=options) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
    command = [sys.executable, __file__, "--memory-of", "restore", str(bench.server.port), url]
    extra = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = sum(tensor.nbytes for tensor in bench.state.values()) / 1e6
    return [("extra memory of restore", f"{extra:.0f} MB", "the tensors", f"{size:.0f} MB", "-")]


def print_memory_of_restore(server: Server, url: str) -> None:
    """Print how much (MB) the peak rises above what the tensors need."""
    with CheckpointManager(url, KEEP_1, storage_options=server.storage_options) as manager:
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_mb()
        restored = manager.restore()
        assert restored is not None
        print(_peak_mb() - before - sum(tensor.nbytes for tensor in restored.state.values()) / 1e6)


def print_memory_of(side: str, server: Server, file: Path) -> None:
    """Print how much (MB) the peak rises while one side sends the file."""
    state = torch.load(file) if side == "save" else {}
    bench = Bench(server, file, state, 1)
    with uploads(attrs.evolve(bench, state={})) as sides:
        # What connecting and the first request take is not of the payload.
        sides["save"](0)
    with uploads(bench) as sides:
        # Not ru_maxrss: a child inherits its parent's.
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_mb()
        sides[side](0)
        print(_peak_mb() - before)


def _peak_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


# What a save asks of the server


def count_requests(bench: Bench) -> list[tuple[str, str, str, str]]:
    """Return for some policies what the third save sends: requests, how many, and bytes beside the payload's."""
    both = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min"), KeepLast(1)], last="copy", best="copy")
    return [
        ("small, keep 1", *_third_save(bench, KEEP_1, 1000)),
        ("50 MB, keep 1", *_third_save(bench, KEEP_1, 12_500_000)),
        ("50 MB, keep 1, last='copy'", *_third_save(bench, attrs.evolve(KEEP_1, last="copy"), 12_500_000)),
        ("50 MB, keep 1, last='link'", *_third_save(bench, attrs.evolve(KEEP_1, last="link"), 12_500_000)),
        ("50 MB, best 2 and last 1, both aliases", *_third_save(bench, both, 12_500_000)),
    ]


def _third_save(bench: Bench, policy: Policy, floats: int) -> tuple[str, str, str]:
    state = {"w": torch.zeros(floats)}
    with CountingProxy(bench.server.port) as proxy:
        server = attrs.evolve(bench.server, port=proxy.port)
        url, options = server.fresh(), server.storage_options
        with CheckpointManager(url, policy, state=lambda: state, storage_options=options) as manager:
            for step in (1, 2):
                manager.observe({"loss": 1 / step}, step=step, epoch=0, epoch_end=False)
            proxy.start()
            manager.observe({"loss": 1 / 3}, step=3, epoch=0, epoch_end=False)
            beyond = proxy.sent - (manager.last.size if manager.last else 0)
            return str(proxy.kinds.total()), str(proxy), f"{beyond / 1000:.1f} kB"


# Opening a directory


def open_10_000(bench: Bench) -> list[Row]:
    """Open a directory of 10 000 records with its index, beside opening it without; locally and on S3."""
    policy = Policy(EverySteps(1), [KeepAll()])
    files = {path: data for name, data in records_of(10_000) for path, data in _both(name, data)}
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as folder, CountingProxy(bench.server.port) as proxy:
        server = attrs.evolve(bench.server, port=proxy.port)
        url = server.fresh()
        for path, data in files.items():
            Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, path).write_bytes(data)
        bench.fs.pipe({f"{url}/{path}".removeprefix("s3://"): data for path, data in files.items()}, batch_size=32)
        for where, directory, options in (("locally", folder, None), ("on S3", url, server.storage_options)):
            proxy.start()
            start = time.perf_counter()
            with CheckpointManager(directory, policy, state=dict, storage_options=options) as manager:
                without = time.perf_counter() - start
                assert len(manager.records) == 10_000
                requests_without = proxy.kinds.total()
            proxy.start()
            opening = functools.partial(_open, directory, policy, options)
            found = bench.time_each({"open": opening})["open"]
            rows.append(compared(f"open 10 000 records {where}", found, "without index", without, unit="s", goal=""))
        requests = f"{proxy.kinds.total() / (bench.repeats + 1):.0f}"
        rows.append(("requests for it", requests, "without index", str(requests_without), "-"))
    return rows


def _both(name: str, record: bytes) -> list[tuple[str, bytes]]:
    return [(f".checkpointer/records/{name}.json", record), (name, b"")]


def _open(directory: str, policy: Policy, options: Mapping[str, Any] | None, number: int) -> None:
    manager = CheckpointManager(directory, policy, storage_options=options)
    assert len(manager.records) == 10_000


# Restoring


def restores(bench: Bench) -> list[Row]:
    """Restore, which verifies the digest too, beside plain torch.load and beside a download."""
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        fs, options, url = bench.fs, bench.server.storage_options, bench.server.fresh()
        fs.put_file(str(bench.file), f"{url}/plain")

        def download(number: int) -> object:
            fs.get_file(f"{url}/plain", f"{folder}/plain")
            return torch.load(f"{folder}/plain", weights_only=True)

        for where, directory, peer, plain in (
            ("locally", f"{folder}/run", "torch.load", lambda _: torch.load(bench.file, weights_only=True)),
            ("from S3", f"{url}/run", "get_file, torch.load", download),
        ):
            with CheckpointManager(directory, KEEP_1, state=lambda: bench.state, storage_options=options) as manager:
                manager.observe({}, step=1, epoch=0)
                took = bench.time_each({"ours": functools.partial(_restore, manager), "plain": plain})
            what = f"restore {bench.file.stat().st_size / 1e9:.2g} GB {where}"
            rows.append(compared(what, took["ours"], peer, took["plain"], unit="s", goal=""))
    return rows


def _restore(manager: CheckpointManager, number: int) -> None:
    assert manager.restore() is not None


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--transfers", action="store_true", help="measure only uploads and downloads")
    parser.add_argument("--memory-of", nargs=3, metavar=("SIDE", "PORT", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        side, port, what = arguments.memory_of
        server = SeaweedFS(Path(), int(port), ())
        if side == "restore":
            print_memory_of_restore(server, what)
        else:
            print_memory_of(side, server, Path(what))
        return
    with prepared(arguments.gigabytes, arguments.repeats) as bench:
        rows = [*upload_to_s3(bench), *download_from_s3(bench)]
        if not arguments.transfers:
            rows += [*memory_of_uploads(bench), *memory_of_restore(bench), *open_10_000(bench), *restores(bench)]
        show(rows)
        if arguments.transfers:
            return
        print()
        show(count_requests(bench), head=("third save", "requests", "which", "sent beside the payload"))


if __name__ == "__main__":
    main()
