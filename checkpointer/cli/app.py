"""The application: every command by its name, and how errors and warnings are printed."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final

import typer

from checkpointer._secrets import without_secrets
from checkpointer.cli.options import expanded
from checkpointer.cli.output import say
from checkpointer.errors import CheckpointerError, CheckpointerWarning

COMMANDS: Final = {
    "ls": "ls", "show": "show", "best": "paths", "last": "paths", "diff": "diff", "verify": "verify",
    "prune": "prune", "sweep": "sweep", "copy": "copy", "adopt": "adopt", "export": "weights", "average": "weights",
    "simulate": "simulate", "plot": "chart", "report": "chart",
}  # fmt: skip
"""The module in `checkpointer.cli.commands` of each command."""
CANNOT: Final = 2
"""Exit code: it could not be done, and nothing was changed."""

app = typer.Typer(
    name="checkpointer",
    epilog="Exit codes: 0 fine, 1 something bad was found, 2 it could not be done, and nothing was changed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        from checkpointer import __version__

        sys.stdout.write(f"{__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look at checkpoints, and manage them. Nothing that is read is ever unpickled."""


for _name, _place in COMMANDS.items():
    _module = importlib.import_module(f"checkpointer.cli.commands.{_place}")
    app.command(_name)(expanded(getattr(_module, f"{_name}_command")))


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        with _warnings_on_stderr():
            app(args=None if argv is None else list(argv), prog_name="checkpointer")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else CANNOT
    except BrokenPipeError:
        # The reader of the output has closed it: Python must not report that as an error when it ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointerError, OSError, ImportError, UnicodeError) as error:
        say(f"checkpointer: {without_secrets(str(error)) or type(error).__name__}")
        return CANNOT
    return 0


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", CheckpointerWarning)
        warnings.showwarning = show
        yield
