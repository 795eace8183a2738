"""Files of a person, such as a policy, a picture or weights: durable, whole or not at all; and pipes and devices."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import mounts
from support.commands import command, train
from support.users import ordinary_user

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepBest, Manifest, Policy
from checkpointer._new_file import new_file
from checkpointer.errors import NameTakenError, StorageError
from checkpointer.tools.chart.data import chart_of_records
from checkpointer.tools.chart.html import report
from checkpointer.tools.policy_file import START

ALL = Policy(EverySteps(1), [KeepAll()])
CLI = (sys.executable, "-m", "checkpointer")


def received(pipe: Path, write: object) -> bytes:
    """Return what ``write`` puts into a pipe."""
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(pipe)  # type: ignore[operator]
    reader.join(60)
    return got[0]


def test_a_pipe_gets_what_a_file_would(tmp_path: Path) -> None:
    """It is not replaced by a file of its name."""
    run = train(tmp_path / "run", 0.9, 0.2)
    chart = chart_of_records("empty", Manifest())
    assert report(chart).encode() == received(tmp_path / "p.html", lambda pipe: report(chart, pipe))
    assert ALL.to_yaml().encode() == received(tmp_path / "p.yaml", ALL.to_yaml)
    assert START.encode() == received(tmp_path / "s.yaml", lambda pipe: command("policy", "init", pipe))
    for name in ("w.safetensors", "w.pt"):
        data = received(tmp_path / name, lambda pipe: command("export", run, 20, pipe))
        state = safetensors.torch.load(data) if "safe" in name else torch.load(io.BytesIO(data))
        assert {"b", "w"} == set(state), name
    assert all(path.is_fifo() for path in tmp_path.iterdir() if path != run)


def test_the_best_k_go_to_a_pipe(tmp_path: Path) -> None:
    """As ``manager.to_yaml(path)`` writes them to a file."""
    best = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")])
    with CheckpointManager(tmp_path / "run", best, state=dict) as manager:
        manager.observe({"loss": 0.5}, step=1, epoch=0)
        assert b": 0.5\n" in received(tmp_path / "p", manager.to_yaml)


@pytest.mark.parametrize(
    ("argv", "redirected"),
    [("init /dev/stdout", "> {}"), ("init /dev/fd/1", "| cat > {}"), ("init -", ">> {}")],
)
def test_stdout_gets_the_policy_alone(tmp_path: Path, argv: str, redirected: str) -> None:
    """What a command says about it goes to stderr, and the file of a redirection is not replaced."""
    assert (START.encode(), "") == redirected_output(f"policy {argv}", redirected, tmp_path / "out")
    assert not Path("-").exists()


@pytest.mark.parametrize("redirected", [">> {}", "| cat > {}"])
def test_stdout_gets_the_weights_alone(tmp_path: Path, redirected: str) -> None:
    """For example, to another machine."""
    run = train(tmp_path / "run", 0.9, 0.2)
    data, said = redirected_output(f"export {run} 20 /dev/stdout --format torch", redirected, tmp_path / "out")
    assert {"b", "w"} == set(torch.load(io.BytesIO(data)))
    assert said.startswith("/dev/stdout: 2 tensors")


def redirected_output(argv: str, redirected: str, out: Path) -> tuple[bytes, str]:
    """Run a command in a shell; return what it has added to the file, and its stderr."""
    out.write_bytes(before := b"before" if ">>" in redirected else b"")
    line = f"{' '.join(CLI)} {argv} {redirected.format(out)}"
    done = subprocess.run(line, shell=True, check=True, capture_output=True, text=True)
    assert out.read_bytes().startswith(before)
    return out.read_bytes().removeprefix(before), done.stderr


def test_weights_and_json_do_not_share_stdout(tmp_path: Path) -> None:
    """Neither reader could read its part."""
    run = train(tmp_path / "run", 0.9)
    argv = [*CLI, "export", str(run), "10", "/dev/stdout", "--format", "torch", "--json"]
    done = subprocess.run(argv, capture_output=True, check=False)
    assert (2, b"") == (done.returncode, done.stdout)
    assert b"/dev/stdout gets the weights, and --json prints to it too; leave one of them out" in done.stderr


def test_a_device_that_takes_nothing_is_named(tmp_path: Path) -> None:
    """As a full disk is."""
    with pytest.raises(StorageError, match="cannot write /dev/full: No space left on device"):
        ALL.to_yaml("/dev/full")
    ALL.to_yaml("/dev/null")


def test_the_name_of_a_new_file_is_durable(tmp_path: Path) -> None:
    """Its folder is fsynced after it got its name, else a power loss takes the name away."""
    mounts.need("strace")
    run = train(tmp_path / "run", 0.9)
    log = tmp_path / "log"
    for argv in (["policy", "init", f"{tmp_path}/p.yaml"], ["report", str(run), f"{tmp_path}/r.html"]):
        trace = [
            "strace",
            "-f",
            "-qq",
            "-y",
            "-o",
            str(log),
            "-e",
            "trace=fsync,fdatasync,link,linkat,rename,renameat2",
        ]
        subprocess.run([*trace, *CLI, *argv], check=True, capture_output=True)
        calls = [re.sub(r"^\d+ +", "", line) for line in log.read_text().splitlines()]
        named = next(number for number, call in enumerate(calls) if f'{argv[-1]}"' in call)
        assert any(call.startswith("fsync") and f"<{tmp_path}>" in call for call in calls[named:]), calls


def test_a_policy_on_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    """An empty policy file would stop the next training."""
    with mounts.tmpfs(tmp_path, 2 * mounts.MIB) as disk:
        ALL.to_yaml(disk / "p.yaml")
        before = (disk / "p.yaml").read_bytes()
        with mounts.filled(disk, 0), pytest.raises(StorageError, match=r"cannot write .*No space left on device"):
            Policy(EverySteps(2), [KeepAll()]).to_yaml(disk / "p.yaml")
        assert before == (disk / "p.yaml").read_bytes()


def test_a_file_that_is_there_is_not_a_device(tmp_path: Path) -> None:
    """A file or a folder with the name is refused, unless it is to be replaced."""
    (tmp_path / "f").write_text("old")
    with pytest.raises(NameTakenError, match="is there already"), new_file(tmp_path / "f", replaces=False):
        raise AssertionError
    with new_file(tmp_path / "f", replaces=True) as stream:
        stream.write(b"new")
    assert "new" == (tmp_path / "f").read_text()


def test_a_file_in_a_folder_that_may_only_be_written_to_is_no_error() -> None:
    """Such a folder cannot be opened, so nothing makes its entries durable."""
    with ordinary_user() as folder:
        folder.chmod(0o300)
        with new_file(folder / "w.pt", replaces=False) as stream:
            stream.write(b"weights")
        assert (folder / "w.pt").read_bytes() == b"weights"
        folder.chmod(0o700)
