"""``checkpointer policy``: write a policy file, check it, or show the one that a run has noted."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from checkpointer._display import count_text
from checkpointer._new_file import new_file
from checkpointer.cli import options, output
from checkpointer.cli.choose_run import choose, not_noted
from checkpointer.policy.yaml_codec import MAX_YAML_BYTES
from checkpointer.tools.policies import noted_text
from checkpointer.tools.policy_file import START, check_policy

policy_commands = typer.Typer(
    help="Write a policy file, check it, or show the one that a run has noted.",
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
"""The commands below ``checkpointer policy``."""


def check(
    file: Annotated[str, options.argument("FILE", "The file; - reads stdin.")],
    as_json: options.Json = False,
) -> None:
    """Check a policy file, and print what it means. Exits with 1 if something in it is wrong; each error has its line.

    Example: checkpointer policy check policy.yaml
    """
    data = sys.stdin.buffer.read(MAX_YAML_BYTES + 1) if file == "-" else options.read_policy_file(file)
    found, problems = check_policy(data)
    if as_json:
        means = None if found is None else str(found)
        output.print_json({"policy": means, "problems": [{"line": p.line, "text": p.text} for p in problems]})
    elif found is not None:
        output.print_line(f"{file}: {found}")
    else:
        for problem in problems:
            output.print_line(f"{file}, {problem}")
        output.print_line(f"{file}: {count_text(len(problems), 'problem')}")
    output.leave_if(bool(problems))


def init(
    file: Annotated[str, options.argument("[FILE]", "The new file; without it, or with -, it is printed.")] = "",
) -> None:
    """Write a policy file to begin with.

    It saves every epoch, keeps the best 3 and the last 2, and has more as comments.

    Example: checkpointer policy init policy.yaml
    """
    if file in ("", "-") or output.is_stdout(file):
        output.write(START)
        return
    with new_file(file, replaces=False) as stream:
        stream.write(START.encode())
    output.print_line(f"{file}: written; edit it, then try 'checkpointer policy check {file}'")


def show(directory: options.Directory, access: options.Access, run: options.Run = None) -> None:
    """Print the policy that a run has noted in its directory, as YAML.

    Example: checkpointer policy show runs/digits > policy.yaml
    """
    catalog = options.look(directory, access)
    chosen = choose(catalog, run)
    text = noted_text(catalog, chosen.manifest.run, chosen.manifest.label)
    if not text:
        raise not_noted(chosen)
    for line in text.splitlines():
        output.print_line(line)


for _command in (init, check, show):
    policy_commands.command(_command.__name__)(options.expanded(_command))
