"""The digits example on real data, killed at random instants: it ends with the weights of a run that was not."""

from __future__ import annotations

import os
import pty
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.commands import command
from support.forking import Program
from support.sampling import some

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples/digits_loop.py"
PATIENCE_S = 300.0
"""A run that takes this long (seconds) hangs."""


def start(directory: Path) -> Program:
    """Start the example in a process of its own."""
    return Program(run_example, "--directory", str(directory), "--quiet")


def run_example(*arguments: str) -> None:
    os.environ["COLUMNS"] = "100"
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def finish(process: Program) -> list[str]:
    """Let the example come to its end, and return the lines it prints."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert 0 == process.returncode, err
    return out.splitlines()


def files_of(directory: Path) -> set[tuple[str, int, int]]:
    """Return what can be seen of a directory's files: path, inode, size."""
    found = set()
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            try:
                stat = path.lstat()
            except FileNotFoundError:  # It went while we looked.
                continue
            found.add((str(path), stat.st_ino, stat.st_size))
    return found


def stop_after(process: Program, how: signal.Signals, directory: Path, changes: int, delay: float) -> int:
    """Wait until the directory has changed so often, and ``delay`` seconds more; then end the process.

    Changes are counted, and not seconds, so that the kill falls within the training on a slow and on a fast machine.
    """
    give_up = time.monotonic() + PATIENCE_S
    before = files_of(directory)
    while changes and process.poll() is None:
        assert time.monotonic() < give_up, "the example does not save"
        now = files_of(directory)
        changes -= now != before
        before = now
        time.sleep(0.0005)
    time.sleep(delay)
    process.send_signal(how)
    process.communicate(timeout=PATIENCE_S)
    return process.returncode


def last_step(directory: Path) -> int:
    """Return the step that ``last.ckpt`` holds, read by torch alone; 0 if there is no such link yet."""
    link = directory / "last.ckpt"
    if not link.is_symlink():
        return 0
    return int(torch.load(link, weights_only=True)["loop"]["step"])


def kept(directory: Path) -> set[str]:
    """Return the names of the checkpoints in a directory, aliases included."""
    return {path.name for path in directory.glob("*.ckpt")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that nothing interrupts: its directory and what it printed."""
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    return directory, finish(start(directory))


@pytest.mark.parametrize(
    ("how", "stops", "seed"), [(signal.SIGKILL, 5, 1), (signal.SIGKILL, 5, 2), (signal.SIGINT, 3, 3)]
)
def test_a_run_stopped_anywhere_ends_with_the_weights_of_an_unbroken_one(
    tmp_path: Path, unbroken: tuple[Path, list[str]], how: signal.Signals, stops: int, seed: int
) -> None:
    """Killed or interrupted, often within a save; ``last.ckpt`` is whole each time and never goes back."""
    dice = random.Random(seed)
    directory = tmp_path / "run"
    reached = [0]
    changes = [dice.randint(1, 20) for _ in range(some(stops))]
    # The last one is not before the first checkpoint.
    for change in (*changes, 25):
        code = stop_after(start(directory), how, directory, change, dice.uniform(0.0, 0.1))
        assert 0 != code, "the run came to its end before it could be stopped"
        reached.append(last_step(directory))
    lines = finish(start(directory))
    assert sorted(reached) == reached
    assert 0 < reached[-1] <= last_step(directory)
    assert any(line.startswith("resumed from ") for line in lines)
    assert unbroken[1][-1].startswith("weights xxh3-128 ")
    assert unbroken[1][-1] == lines[-1]
    assert kept(unbroken[0]) == kept(directory)


def test_a_finished_run_only_shows_its_table_again(unbroken: tuple[Path, list[str]]) -> None:
    """Same table, same weights, and no payload is written anew."""
    directory, lines = unbroken
    before = {path: path.lstat().st_mtime_ns for path in directory.glob("*.ckpt")}
    again = finish(start(directory))
    assert again[0].startswith("resumed from ")
    assert lines == again[1:]
    assert before.items() >= {path: path.lstat().st_mtime_ns for path in directory.glob("epoch*.ckpt")}.items()


ROOT = Path(__file__).parents[1]


def same_but_numbers(shown: str, printed: str) -> bool:
    """Return whether two texts are equal but for their numbers, which depend on the processor and the time."""
    left, right = (re.sub(r"[0-9a-f]{32}|[\d.]+( ?(s|min|kB|MB)\b)?", "#", text) for text in (shown, printed))
    return [re.sub(r"\s+", " ", line).strip() for line in left.splitlines()] == [
        re.sub(r"\s+", " ", line).strip() for line in right.splitlines()
    ]


def test_the_pages_show_what_the_run_prints_and_what_ls_says_of_it(
    unbroken: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README shows ``ls``, and the page on the first run shows the end of the run."""
    directory, lines = unbroken
    page = re.search(r"^```console\n(Kept in.*?)```", (ROOT / "docs/first-run.md").read_text("utf-8"), re.M | re.S)
    assert page is not None
    begin = next(number for number, line in enumerate(lines) if "Kept in" in line)
    printed = "\n".join(lines[begin:]).replace(str(directory), "runs/digits")
    assert same_but_numbers(re.sub("[━─]+", "-", page[1]), re.sub("[━─]+", "-", printed)), printed

    readme = re.search(r"^\$ checkpointer (ls .*)\n([^`]*)```", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert readme is not None
    (directory.parent / "runs").mkdir()
    (directory.parent / "runs/digits").symlink_to(directory)
    (directory.parent / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(directory.parent)
    assert same_but_numbers(readme[2], command(*readme[1].split(), columns=80).out)


def on_terminal(directory: Path, *, interrupt: bool) -> tuple[int, str]:
    """Run two epochs on a terminal; return the status and what is shown. Ctrl-C comes after the first checkpoint."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, str(EXAMPLE), "--directory", str(directory), "--epochs", "2"]
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen(argv, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(ours, 1 << 16):
                shown.append(chunk)
        except OSError:
            pass  # Linux's answer once the process has ended.

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + PATIENCE_S
    while interrupt and not (directory / "last.ckpt").is_symlink():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    if interrupt:
        process.send_signal(signal.SIGINT)
    code = process.wait(PATIENCE_S)
    reader.join()
    os.close(ours)
    return code, b"".join(shown).decode()


def test_ctrl_c_ends_the_demo_with_one_line_and_the_bars_of_a_resumed_run_end_at_100_percent(tmp_path: Path) -> None:
    """On a real terminal: status 130, no traceback; and the finished demo says how to begin anew."""
    code, shown = on_terminal(tmp_path / "run", interrupt=True)
    assert (130, False, 1) == (code, "Traceback" in shown, shown.count("stopped by SIGINT at step")), shown
    code, shown = on_terminal(tmp_path / "run", interrupt=False)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert (0, True) == (code, "resumed from" in plain), shown
    assert f"rm -r {tmp_path / 'run'}" in plain.replace("\r\n", "")
    for epoch in re.findall(r"epoch (\d) ", plain):
        assert "100" == re.findall(rf"epoch {epoch} \D*?(\d+)%", plain)[-1]
    assert "epoch 2" in plain
    assert re.search(r"│ epoch=1-step=\d+-val_loss=[\d.]+\.ckpt +│", plain)  # A name is not broken at 80 columns.
