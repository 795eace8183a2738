"""The storage on the page about own storages works: it has at most 30 lines, and passes the contract."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.ports import Storage
from checkpointer.testing import CrashingStorage, StorageContract
from checkpointer.testing.crashing import Crash

PAGE = Path(__file__).parents[2] / "docs" / "own-storage.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
POLICY = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)], last="copy", best="link")


def run(*blocks: str) -> dict[str, Any]:
    """Run these blocks one after the other, and return their names."""
    names: dict[str, Any] = {"__name__": "own_storage"}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    return names


class TestOnThePage(StorageContract):
    """The first block, with a file."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> Iterator[None]:
        self.folder = tmp_path
        self.made: list[Any] = []
        yield
        for storage in self.made:
            storage.db.close()

    def make_storage(self) -> Storage:
        self.made.append(run(BLOCKS[0])["SqliteStorage"](self.folder / f"{len(self.made)}.db"))
        storage: Storage = self.made[-1]
        return storage


@pytest.fixture
def storages(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """Two storages on one file."""
    make = run(BLOCKS[0])["SqliteStorage"]
    both = make(tmp_path / "runs.db"), make(tmp_path / "runs.db")
    yield both
    for storage in both:
        storage.db.close()


def test_it_is_as_short_as_the_page_says() -> None:
    """Imports and empty lines are not counted."""
    lines = [line for line in BLOCKS[0].splitlines() if line.strip() and not re.match("import|from", line)]
    assert len(lines) <= 30
    assert "in 30 lines" in PAGE.read_text(encoding="utf-8")


def test_the_example_is_the_one_on_the_page() -> None:
    """The example and the page have the same text."""
    example = (PAGE.parents[1] / "examples" / "own_storage.py").read_text(encoding="utf-8")
    imports, code = BLOCKS[0].split("BELOW", 1)
    assert f"BELOW{code}" in example
    assert all(line in example.splitlines() for line in imports.splitlines())


def test_the_other_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in the order of the page."""
    monkeypatch.chdir(tmp_path)
    names = run(*BLOCKS)

    names["TestSqliteStorage"]().test_write_replaces_the_whole_file()
    assert 3 == len(BLOCKS)
    assert (tmp_path / "runs.db").exists()


def test_a_manager_saves_and_another_restores(storages: tuple[Any, Any]) -> None:
    """It also makes aliases and retires checkpoints."""
    steps = iter((1, 2, 3))
    with CheckpointManager(storages[0], POLICY, state=lambda: {"step": next(steps)}) as manager:
        for step, loss in enumerate((0.5, 0.1, 0.3), start=1):
            manager.observe({"loss": loss}, step=step, epoch=0, epoch_end=False)

    with CheckpointManager(storages[1], POLICY) as manager:
        last, best = manager.restore("last"), manager.restore("best")
        assert last is not None
        assert best is not None
        assert ({"step": 3}, {"step": 2}) == (last.state, best.state)
    names = {name for name in storages[1].list() if not name.startswith(".checkpointer/")}
    assert {"epoch=0-step=2.ckpt", "epoch=0-step=3.ckpt", "last.ckpt", "best.ckpt"} == names


@pytest.mark.slow
def test_a_kill_at_any_operation_loses_nothing(tmp_path: Path) -> None:
    """An acknowledged checkpoint restores, as on a disk."""
    make = run(BLOCKS[0])["SqliteStorage"]
    at = 0
    while True:
        at += 1
        storage = make(tmp_path / f"{at}.db")
        acknowledged = -1
        try:
            with CheckpointManager(CrashingStorage(storage, at=at), POLICY, state=lambda: {"w": 1}) as manager:
                for step in (1, 2):
                    manager.observe({"loss": 1 / step}, step=step, epoch=0, epoch_end=False)
                    acknowledged = step
        except Crash:
            is_over = False
        else:
            is_over = True
        with CheckpointManager(storage, POLICY) as manager:
            restored = manager.restore()
        storage.db.close()
        assert (restored.step if restored else -1) >= acknowledged
        if is_over:
            break
    assert at > 20
