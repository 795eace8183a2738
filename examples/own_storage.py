"""A storage of your own in 30 lines. It keeps all files in one SQLite file; docs/own-storage.md explains it."""

import io
import sqlite3
import tempfile
from types import SimpleNamespace
from typing import Any, BinaryIO

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.ports import Stat

BELOW = "(path = ?1 OR substr(path, 1, length(?1) + 1) = ?1 || '/' OR ?1 = '')"


class SqliteStorage:
    def __init__(self, file: str) -> None:
        self.db = sqlite3.connect(file, timeout=60, isolation_level=None, check_same_thread=False)
        self.run("CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT UNIQUE, data BLOB)")

    def run(self, sql: str, *values: object) -> list[Any]:
        try:
            return self.db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise OSError(str(error)) from error

    def list(self, prefix: str = "") -> dict[str, Stat]:
        rows = self.run(f"SELECT path, length(data), id FROM files WHERE {BELOW}", prefix)
        return {path: Stat(size, version=str(number)) for path, size, number in rows}

    def open(self, path: str) -> BinaryIO:
        for [data] in self.run("SELECT data FROM files WHERE path = ?", path):
            return io.BytesIO(data)
        raise FileNotFoundError(path)

    def write(self, path: str, data: bytes, *, unless: str = "") -> None:
        if not self.run(f"REPLACE INTO files (path, data) SELECT ?1, ?2 {unless} RETURNING id", path, data):
            raise FileExistsError(path)

    def delete(self, path: str) -> None:
        self.run(f"DELETE FROM files WHERE {BELOW}", path)

    def upload(self, path: str) -> Any:
        buffer, is_taken = io.BytesIO(), f"WHERE NOT EXISTS (SELECT 1 FROM files WHERE {BELOW})"

        def publish(*, replace: bool) -> None:
            self.write(path, buffer.getvalue(), unless="" if replace else is_taken)

        return SimpleNamespace(write=buffer.write, finish=lambda: None, publish=publish, abort=lambda: None)


def main() -> None:
    policy = Policy(EverySteps(10), [KeepBest(2, "loss", mode="min"), KeepLast(1)], last="copy")
    with tempfile.TemporaryDirectory() as folder:
        storage = SqliteStorage(f"{folder}/runs.db")
        with CheckpointManager(storage, policy, state=lambda: {"w": 1}) as manager:
            for step, loss in ((10, 0.9), (20, 0.4), (30, 0.6), (40, 0.7)):
                print(manager.observe({"loss": loss}, step=step, epoch=0))
        with CheckpointManager(storage, policy) as manager:
            restored = manager.restore()
            print(f"restored step {restored.step}" if restored else "found no checkpoint")
        print(
            "payloads in the table:", *sorted(name for name in storage.list() if not name.startswith(".checkpointer/"))
        )
        storage.db.close()


if __name__ == "__main__":
    main()
