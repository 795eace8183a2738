"""What all measures of one run have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.peers import Peer


@dataclass(frozen=True)
class Setup:
    """Sizes, rounds, and who takes part."""

    megabytes: int
    repeats: int
    peers: Sequence[Peer]
    trees: dict[str, Path]
    """The builds, by name."""
    checkpoints: Sequence[int] = (10, 1000, 10_000)
    many_tensors: int = 20_000

    @property
    def before(self) -> str | None:
        """The name of the build before, if there is one."""
        return next(iter(list(self.trees)[1:]), None)
