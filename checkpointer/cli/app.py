"""The application: every command by its name, and how errors and warnings are printed."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from checkpointer._display import without_errno
from checkpointer.cli.streams import flush, say
from checkpointer.errors import CheckpointerError, CheckpointerWarning

COMMANDS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Look": {
        "ls": ("ls", "List the checkpoints of a directory, or the directories below it."),
        "show": ("show", "Show one checkpoint or any file: its tensors and values."),
        "last": ("last_best", "Print the path of the newest checkpoint."),
        "best": ("last_best", "Print the path of the best checkpoint."),
        "diff": ("diff", "Compare two checkpoints or files, tensor by tensor."),
        "verify": ("verify", "Compare checkpoints or files with their checksums."),
        "watch": ("watch", "Follow a training that runs elsewhere."),
        "plot": ("plot_report", "Draw a run as a picture."),
        "report": ("plot_report", "Write an HTML page about a run."),
    },
    "Change": {
        "prune": ("prune", "Remove what a policy does not keep; shows it first."),
        "rm": ("rm", "Remove named checkpoints; shows it first."),
        "pin": ("pin_unpin", "Keep a checkpoint, whatever the rules say."),
        "unpin": ("pin_unpin", "Let the rules decide about a checkpoint again."),
        "sweep": ("sweep", "Finish or remove what ended processes left."),
        "copy": ("copy", "Copy a directory to another storage."),
        "adopt": ("adopt", "Make records for checkpoints of other programs."),
        "export": ("export_average", "Write the weights of a checkpoint as one file."),
        "average": ("export_average", "Write the mean of several checkpoints."),
    },
    "Plan": {
        "doctor": ("doctor", "Try a directory or URL before a long run."),
        "policy": ("policy", "Write a policy file, check it, or show a run's own."),
        "simulate": ("simulate", "Apply a policy to the metrics of a training."),
        "version": ("version", "Print the versions of this installation."),
    },
}
"""For each group of the help: the commands, each with its module in `checkpointer.cli.commands` and what it does."""
CANNOT: Final = 2
"""Exit code: it could not be done, and nothing was changed."""

_PLACES: Final = {name: place for group in COMMANDS.values() for name, (place, _) in group.items()}
_SETTINGS: Final = {"help_option_names": ["-h", "--help"]}


class _Commands(TyperGroup):
    """Imports a command when it is called, so that the help does not wait for the modules of all commands."""

    def resolve_command(self, ctx: Any, args: Any) -> Any:
        """Return the command of that name."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else _load(name), rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group."""
        for title, group in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, what) for name, (_, what) in group.items()])


app = typer.Typer(
    name="checkpointer",
    cls=_Commands,
    epilog="Exit codes: 0 fine, 1 something bad was found, 2 it could not be done, and nothing was changed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_SETTINGS,
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
    """Look at checkpoints, and manage them. Nothing that is read is ever unpickled.

    'checkpointer COMMAND -h' shows the arguments and options of a command.
    """


for _group in COMMANDS.values():
    for _name, (_, _what) in _group.items():
        # It stands for a command that is not imported yet.
        app.command(_name, help=_what)(lambda: None)


def _load(name: str) -> Any:
    from checkpointer.cli.options import expanded

    module = importlib.import_module(f"checkpointer.cli.commands.{_PLACES[name]}")
    one: typer.Typer | None = getattr(module, f"{name}_commands", None)
    if one is None:
        one = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=_SETTINGS)
        one.command(name)(expanded(getattr(module, f"{name}_command")))
    return typer.main.get_command(one)


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    code = 0
    try:
        with _warnings_on_stderr():
            app(args=None if argv is None else list(argv), prog_name="checkpointer")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else CANNOT
    except (CheckpointerError, OSError, ImportError, UnicodeError) as error:
        say(f"checkpointer: {_text_of(error)}")
        code = CANNOT
    flush()
    return code


def _text_of(error: Exception) -> str:
    """Return an error as it is printed: without numbers of the system."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename and not isinstance(error, CheckpointerError):
        text = f"{error.filename}: {error.strerror}"
    return without_errno(text)


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", CheckpointerWarning)
        warnings.showwarning = show
        yield
