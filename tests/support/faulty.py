"""A folder that fsspec reaches like a server. A test chooses the errors before and after a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

Hook = Callable[[str, str], None]


class FaultyFileSystem(LocalFileSystem):  # type: ignore[misc]
    """``faulty:///path``. If a hook raises after a request, the request was applied and its reply is lost."""

    protocol = "faulty"
    cachable = False
    refuses: ClassVar[bool] = False
    """Whether a rename onto an existing file fails, as on WebDAV, SMB and HDFS."""
    hooks: ClassVar[dict[str, Hook]] = {}
    """Called ``"before"`` and ``"after"`` each request, with its method and path."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("faulty://"))  # type: ignore[no-any-return]

    def _strike(self, when: str, method: str, path: str) -> None:
        if when in self.hooks:
            self.hooks[when](method, path)

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        self._strike("before", "ls", path)
        return super().ls(path, detail=detail, **kwargs)

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        self._strike("before", "mv", path2)
        if self.refuses and self.exists(path2):
            raise FileExistsError(path2)
        super().mv(path1, path2, **kwargs)
        self._strike("after", "mv", path2)

    def rm_file(self, path: str) -> None:
        self._strike("before", "rm", path)
        super().rm_file(path)
        self._strike("after", "rm", path)

    def open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        self._strike("before", f"open {mode}", path)
        stream = super().open(path, mode, *args, **kwargs)
        self._strike("after", f"open {mode}", path)
        return stream


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
