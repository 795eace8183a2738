"""Builds of this library, each in a process of its own that is driven over a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from trees import REPOSITORY, checked_out

from perf.rows import OURS
from perf.sides import Cost, Side


class Build:
    """A worker with one build on its path.

    Args:
        name: What the table calls it.
        tree: The folder with the files of its commit.
    """

    def __init__(self, name: str, tree: Path) -> None:
        self.name = name
        path = [tree, tree / "adapters", REPOSITORY / "benchmarks"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
        command = [sys.executable, "-W", "ignore", "-m", "perf.worker"]
        self._process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # -m puts the working folder before PYTHONPATH.
        where = self.call("where")
        if where != str(tree / "checkpointer"):
            msg = f"the build in {tree} was to be measured, but {where} was imported"
            raise RuntimeError(msg)

    def call(self, name: str, **arguments: Any) -> Any:
        """Let the worker do something, and return what it answers.

        Raises:
            RuntimeError: If it could not.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([name, arguments]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            msg = f"the worker of {self.name} ended with {self._process.wait()}"
            raise RuntimeError(msg)
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def side(self, name: str, **arguments: Any) -> Side:
        """Return a call as a side, whose cost the worker takes."""
        return lambda: Cost(*self.call(name, **arguments))

    def __enter__(self) -> Build:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def trees(before: str | None) -> Iterator[dict[str, Path]]:
    """Return the folders of this build and of the one before, if there is one, by what the table calls them."""
    with contextlib.ExitStack() as stack:
        found = {OURS: REPOSITORY}
        if before:
            found[f"{OURS} {before}"] = stack.enter_context(checked_out(before))
        yield found


@contextlib.contextmanager
def workers(found: dict[str, Path]) -> Iterator[list[Build]]:
    """Return a worker for each tree."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Build(name, tree)) for name, tree in found.items()]
