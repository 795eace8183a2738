"""``checkpointer show``: one checkpoint, its record and its tensors."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from checkpointer._display import age_text, count_text, number_text, size_text
from checkpointer.cli import options, output
from checkpointer.cli.commands.ls import as_data, why
from checkpointer.errors import CheckpointerError, RestoreError
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer.formats.inspection.weights import weights_of
from checkpointer.records.record import Record
from checkpointer.tools.catalog import Catalog
from checkpointer.tools.terms import terms_of


def show_command(
    directory: options.Directory,
    access: options.Access,
    name: Annotated[str, typer.Argument(help="A name, a step, `last` or `best`; not with --run.")] = "",
    run: Annotated[str, typer.Option("--run", metavar="ID", help="Show which processes have held this run.")] = "",
    match: Annotated[str, typer.Option("--match", help="Only tensors and values whose name contains this.")] = "",
    policy: options.PolicyFile = None,
    as_json: options.Json = False,
) -> None:
    """Show a record, and the tensors of its payload with shape, dtype and bytes. Nothing is unpickled or loaded.

    With --run show which processes have held a run: its terms.
    """
    if bool(name) == bool(run):
        msg = "pass the name of a checkpoint, or --run"
        raise typer.BadParameter(msg)
    catalog = options.look(directory, access)
    if run:
        _show_terms(catalog, run, as_json=as_json)
        return
    record = catalog.find(name)
    reason = why(catalog, None if policy is None else options.read_policy(policy))[record.name]
    try:
        with catalog.naming_retired(record), open_contents(catalog.storage, record.name) as contents:
            _show(catalog, record, reason, contents, match, as_json=as_json)
    except CheckpointerError as error:
        _show(catalog, record, reason, None, match, as_json=as_json)
        output.say(f"its tensors cannot be shown: {error}")
        output.leave_if(bad=True)


def _show_terms(catalog: Catalog, run: str, *, as_json: bool) -> None:
    catalog.manifest(run)  # Raises if there is no such run.
    terms = [
        one for known, label in catalog.runs if known == run for one in terms_of(catalog, run, label, catalog.trust)
    ]
    if as_json:
        output.print_json([
            {"term": one.term, "label": one.label, "state": one.state, "limit": one.limit}
            | {"owner": one.claim.owner, "since": one.claim.since}
            for one in terms
        ])  # fmt: skip
        return
    output.print_line(f"{catalog.place}: run {run}, {count_text(len(terms), 'term')}")
    rows = [[str(one.term), one.label, one.state, str(one.claim)] for one in terms]
    output.print_table(["term", "label", "state", "process"], rows, right=["term"])


def _show(
    catalog: Catalog, record: Record, reason: str, contents: Tensors | None, match: str, *, as_json: bool
) -> None:
    if as_json:
        more = {} if contents is None else _as_data(contents, match)
        output.print_json(as_data(catalog, record, reason) | more)
        return
    _print_record(catalog, record, reason)
    if contents is not None:
        _print_contents(contents, match)


def _as_data(contents: Tensors, match: str) -> dict[str, Any]:
    tensors = [
        {"name": info.name, "dtype": info.dtype, "shape": info.shape, "bytes": info.bytes}
        for info in contents.tensors.values()
        if match in info.name
    ]
    others = {key: value for key, value in contents.others.items() if match in key}
    weights = {path: len(part.names) for path, part in contents.parts.items()}
    return {"tensors": tensors, "others": others, "calls": contents.calls, "weights": weights}


def _where(contents: Tensors) -> str:
    """Return which weights `export` would take."""
    try:
        found = weights_of(contents)
    except RestoreError as error:
        return str(error)
    under = f"under {found.prefix!r}" if found.prefix else "all there are"
    return f"{count_text(len(found.tensors), 'tensor')}, {under}"


def _print_record(catalog: Catalog, record: Record, reason: str) -> None:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.time))
    rows = {
        "name": record.name,
        "path": catalog.location(record.name),
        "aliases": ", ".join(catalog.aliases_of(record)),
        "step": f"{record.step} (epoch {record.epoch}{', ended' if record.epoch_end else ''})",
        "metrics": ", ".join(f"{name}={number_text(value)}" for name, value in record.metrics.items()),
        "time": f"{when} ({age_text(time.time() - record.time)} ago)",
        "size": f"{size_text(record.size)} ({record.size} bytes)",
        "digest": record.digest,
        "format": f"{record.format}, {record.contents}",
        "run": f"{record.run}{f' ({record.label})' if record.label else ''}, commit {record.serial}",
        "kind": "" if record.kind == "regular" else record.kind,
        "why": reason,
    }
    output.print_table(["", ""], [([(key, "bold")], value) for key, value in rows.items() if value])


def _print_contents(contents: Tensors, match: str) -> None:
    tensors = [info for info in contents.tensors.values() if match in info.name]
    output.print_line("")
    rows = [(info.name, info.kind, " x ".join(map(str, info.shape)) or "-", size_text(info.bytes)) for info in tensors]
    output.print_table(["tensor", "dtype", "shape", "bytes"], rows, right=["bytes"], folded=0)
    total = size_text(sum(info.bytes for info in tensors))
    elements = count_text(sum(info.numel for info in tensors), "element")
    output.print_line(f"{count_text(len(tensors), 'tensor')}, {elements}, {total}")
    output.print_line(f"weights: {_where(contents)}")
    others = {key: value for key, value in contents.others.items() if match in key}
    if others:
        output.print_line("")
        output.print_table(["value", ""], [(key, str(value)) for key, value in others.items()])
    if contents.calls:
        output.say(f"unpickling it would call {', '.join(contents.calls)}; nothing was unpickled")
