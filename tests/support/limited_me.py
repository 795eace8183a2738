"""Reads files of a megabyte with all readers in half a gigabyte of memory, and prints a line for each failure."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch

from checkpointer import CheckpointerError, Policy
from checkpointer.cli.app import run
from checkpointer.commit.index import INDEX, load, record_path
from checkpointer.formats.dcp_folder import DcpFormat
from checkpointer.formats.inspection.find_weights import weights_of
from checkpointer.formats.inspection.payload import open_contents, open_stream
from checkpointer.formats.inspection.torch_file import TorchContents
from checkpointer.formats.safetensors_file import SafetensorsFormat
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.records.record import Entry
from checkpointer.storage import MemoryStorage, open_storage
from checkpointer.tools.adopt import find_foreign
from checkpointer.tools.catalog import look_at
from checkpointer.tools.diff import diff
from checkpointer.tools.history import read_history
from support.large_files import large_files
from support.sampling import third

SECONDS: Final = 10
"""Of the processor, so that other work of the machine does not count."""
BYTES: Final = 512 << 20


class TooLongError(BaseException):
    """No reader takes it for an error of its file."""


# The readers


def look(data: bytes) -> None:
    """As ``verify --deep``, ``export``, ``diff``, and a Loop that continues the training of another program."""
    with contextlib.closing(open_stream(io.BytesIO(data), "f")) as contents:
        list(contents.problems())
        with contextlib.suppress(CheckpointerError):
            weights_of(contents)
        with contextlib.suppress(CheckpointerError):
            list(diff(contents, contents))
        if isinstance(contents, TorchContents):
            contents.state()


def restore(data: bytes) -> None:
    """As ``restore``."""
    payload = SafetensorsFormat() if data[8:9] == b"{" else TorchFormat()
    payload.read(io.BytesIO(data), weights_only=True, map_location="cpu")


def find_trainer(data: bytes) -> None:
    """As ``adopt`` on a folder of the HF Trainer."""
    storage = MemoryStorage()
    storage.write("checkpoint-1/trainer_state.json", data)
    find_foreign(look_at(storage))


def show(data: bytes) -> None:
    """As ``adopt`` and ``show``, with what they print."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a_1.pt").write_bytes(data)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(["adopt", folder, "--step", "a_1.pt=1"])
            run(["show", folder, "1"])


def drive(*commands: str, **files: bytes) -> None:
    """Run commands in a folder with these files; ``m`` stands for metrics, ``p`` for a policy."""
    given = {"m": b"step,loss\n1,0.5\n", "p": b"when: {EverySteps: {n: 1}}\nkeep: [KeepAll]\n", **files}
    with tempfile.TemporaryDirectory() as folder:
        for name, data in given.items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_bytes(data)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for command in commands:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)  # Each has all of it.
                assert run(command.format(folder).split()) in (0, 1, 2)


def drive_metrics(data: bytes) -> None:
    """What commands make of metrics."""
    drive("simulate {0}/m -p {0}/p", "report {0}/m {0}/r.html -p {0}/p", "plot {0}/m {0}/r.png -p {0}/p", m=data)


def drive_policy(data: bytes) -> None:
    """What commands make of a policy."""
    drive("policy check {0}/p", "policy check {0}/p --json", "simulate {0}/m -p {0}/p", p=data)


def drive_own(data: bytes) -> None:
    """What commands make of the files of this library: each of them is the same one."""
    home, owner = ".checkpointer", "node7_1234abcd_99~17~5~0123456789ab"
    places = ("index.json", "directory.json", "records/a.ckpt.json", "aliases/last.ckpt.json", "terms/k/1.json")
    files = {f"{home}/{place}": data for place in (*places, f"changes/{owner}.json", f"writers/{owner}.json")}
    drive("ls {0}", "watch {0} --once", "policy show {0}", "verify {0}", "sweep {0}", "rm {0} a", **files)


def read_dcp(data: bytes) -> None:
    """A DCP folder with this metadata."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, ".metadata").write_bytes(data)
        Path(folder, "__0_0.distcp").write_bytes(bytes(1000))
        with contextlib.suppress(CheckpointerError), open_contents(open_storage(folder, ""), "") as contents:
            list(contents.problems())
            for name in contents.tensors:
                contents.read(name)
        DcpFormat().read_folder(folder, weights_only=True, map_location="cpu")


def read_index(data: bytes) -> None:
    """The cache of a directory's records."""
    storage = MemoryStorage()
    storage.write(record_path("a.ckpt"), b"{}" + b" " * 500_000)
    storage.write(INDEX, data)
    load(storage)


PRINTED: Final = ("names of one text", "numbers of one list", "digits", "dimensions", "classes of one module")
"""Files that the commands read too."""
READERS: Final[dict[str, tuple[Callable[[bytes], object], ...]]] = {
    "payload": (look, restore),
    "dcp": (read_dcp,),
    "trainer": (find_trainer,),
    "metrics": (lambda data: read_history(data, "f"), drive_metrics),
    "policy": (lambda data: Policy.from_yaml(data.decode() + "\n"), drive_policy),
    "json": (lambda data: Entry.from_json(data, "f"), read_index, drive_own),
}


def cases() -> Iterator[tuple[str, Callable[[bytes], object], bytes]]:
    """Yield every file with every reader of its kind."""
    for (kind, name), make in third(large_files().items()):
        data = make()
        more = (show,) if name.partition(",")[0] in PRINTED else ()
        for number, reader in enumerate((*READERS[kind], *more)):
            yield f"{name}, {getattr(reader, '__name__', number)}", reader, data


def main() -> None:
    """Read all, each within the limits."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    look(b"\x80\x04N.")  # What is imported at first is not the file's.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def give_up(*_: object) -> None:
        raise TooLongError

    signal.signal(signal.SIGPROF, give_up)
    count = 0
    for name, reader, data in cases():
        count += 1
        begin = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            reader(data)
        except CheckpointerError:
            pass
        except BaseException as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.write(f"BAD {name}: {type(error).__name__}: {str(error)[:200]}\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        if (took := time.process_time() - begin) > 1:
            sys.stderr.write(f"{name}: {took:.1f} s\n")
    sys.stdout.write(f"{count} read\n")


if __name__ == "__main__":
    main()
