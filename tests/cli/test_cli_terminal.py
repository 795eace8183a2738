"""The command on a real terminal: colours; and its help, which has an example of each command."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import command, train

from checkpointer.cli.app import COMMANDS

NAMES = [name for group in COMMANDS.values() for name in group]
RED, GREEN = "\x1b[1;31m", "\x1b[32m"


def on_terminal(*argv: object, **env: str) -> str:
    """Run one command whose stdout is a terminal, and return what it shows."""
    ours, theirs = pty.openpty()
    try:
        environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | env
        command = [sys.executable, "-m", "checkpointer", *map(str, argv)]
        subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment, timeout=60)
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
    finally:
        os.close(ours)
    return shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux's answer once the other side is closed and all is read.
        return b""


def test_bad_is_red_and_the_best_is_green_on_a_terminal(tmp_path: Path) -> None:
    """Not if NO_COLOR is set, and not in a file; an empty NO_COLOR does not count."""
    folder = train(tmp_path / "run", 0.5, 0.2, 0.4)
    best = next(path for path in folder.glob("epoch=*") if "step=20" in path.name)
    listed = on_terminal("ls", folder, COLUMNS="120")
    assert f"{GREEN}{best.name}" in listed
    assert 1 == listed.count(f"{GREEN}epoch")
    best.write_bytes(best.read_bytes()[:-1] + b"x")
    assert f"{RED}BAD\x1b[0m   {best.name}: " in on_terminal("verify", folder, NO_COLOR="")
    plain = on_terminal("verify", folder, NO_COLOR="1")
    assert (False, True) == ("\x1b" in plain, f"BAD   {best.name}: " in plain)
    assert "\x1b" not in command("verify", folder).out


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_each_command_has_an_example(name: str) -> None:
    """One line that can be copied; ``policy`` has one for each command below it."""
    for below in ["check", "init", "show"] if name == "policy" else [None]:
        said = command(name, *([below] if below else []), "--help", columns=120)
        assert (0, 1) == (said.code, said.out.count(f"Example: checkpointer {name}"))
        assert "bool" not in said.out.lower()


def test_the_help_imports_no_command_and_few_modules() -> None:
    """Its time is that of imports, so they are counted."""
    code = (
        "import sys; from checkpointer.cli.app import run; run(['--help']); "
        "names = [*sys.modules]; ours = [n for n in names if n.startswith('checkpointer')]; "
        "large = {n.partition('.')[0] for n in names} & {'torch', 'rich', 'yaml', 'attr', 'fsspec', 'numpy'}; "
        "print(len(ours), sorted(large), len(names), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    count, large, of_all = done.stderr.split()
    assert (True, "[]", True) == (int(count) <= 8, large, int(of_all) <= 420), done.stderr
