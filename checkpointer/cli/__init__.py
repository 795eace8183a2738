"""The ``checkpointer`` command. It computes nothing itself: `checkpointer.tools` has a function for each command."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code: 0 fine, 1 something bad was found, 2 it could not be done."""
    try:
        from checkpointer.cli.app import run
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        text = "checkpointer: the command line needs more packages: pip install 'torch-checkpointer[cli]'\n"
        sys.stderr.write(text)
        sys.exit(2)
    # The garbage collector would visit the records of ten thousand checkpoints often, and a command ends soon.
    gc.set_threshold(200_000)
    sys.exit(run(argv))
