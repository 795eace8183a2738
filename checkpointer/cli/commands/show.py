"""``checkpointer show``: one checkpoint, its record and its tensors."""

from __future__ import annotations

import os
import time
from typing import Annotated, Any

from checkpointer._display import age_text, count_text, number_text, size_text
from checkpointer.cli import options, output
from checkpointer.cli.choose_run import find
from checkpointer.cli.commands.ls import as_data, why
from checkpointer.commit.payload_names import location
from checkpointer.errors import CheckpointerError, PolicyError, RestoreError
from checkpointer.formats.inspection.find_weights import weights_of
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer.records.record import Record
from checkpointer.tools.catalog import Catalog
from checkpointer.tools.holders import terms_of
from checkpointer.tools.payloads import Payload, opened


def show_command(
    place: Annotated[str, options.argument("PLACE", "A file or folder with tensors, or a directory of checkpoints.")],
    access: options.Access,
    name: Annotated[
        str,
        options.argument(
            "[NAME]", "In a directory of checkpoints: a name, a step, last or best.", options.complete_name
        ),
    ] = "",
    run: Annotated[
        str | None,
        options.option("--run ID", "The run of NAME. Without NAME: show which processes have held this run."),
    ] = None,
    match: options.Match = "",
    policy: options.PolicyFile = None,
    as_json: options.Json = False,
) -> None:
    """Show the tensors of a checkpoint with shape, dtype and bytes, and its record. Nothing is unpickled or loaded.

    It takes any file or folder that torch, safetensors or a trainer wrote, also at a URL. With --run and no NAME it
    shows which processes have held a run: its terms.

    Example: checkpointer show runs/digits last
    """
    if run is not None and not name:
        _show_terms(options.look(place, access), run, as_json=as_json)
        return
    if not name:
        _show_payload(options.payload(place, access, f"show {place} NAME"), match, as_json=as_json)
        return
    if os.path.isfile(place):
        msg = f"{place} is a file, and {name!r} was given too; show takes one file, or a directory and a name"
        raise PolicyError(msg)
    catalog = options.look(place, access)
    record = find(catalog, name, run, policy)
    reason = why(catalog, options.policies(catalog, policy))[record.name]
    lines = _lines_of(record, catalog.location(record.name))
    lines |= {"aliases": ", ".join(catalog.aliases_of(record)), "why": reason}
    if reason.endswith(record.reason):
        lines["saved"] = ""
    shown = as_data(catalog, record, reason) if as_json else lines
    _show(Payload.of(catalog, record), shown, match, as_json=as_json)


def _show_payload(found: Payload, match: str, *, as_json: bool) -> None:
    """Show a file or folder, and its record if it has one."""
    size = sum(stat.size for stat in found.storage.list(found.name).values())
    path = location(found.storage, found.name)
    if found.problem:
        output.say(f"damaged: {found.problem}")
    if as_json:
        shown = {"path": path, "size": size} if found.record is None else found.record.to_dict() | {"path": path}
    elif found.record is not None:
        shown = _lines_of(found.record, path)
    else:
        shown = {"path": path, "size": f"{size_text(size)} ({size} bytes)", "record": "none"}
    _show(found, shown, match, as_json=as_json)
    output.leave_if(bool(found.problem))


def _show(payload: Payload, shown: dict[str, Any], match: str, *, as_json: bool) -> None:
    """Print what is known of a payload, then its tensors."""
    try:
        with opened(payload, verifies=False) as contents:
            if as_json:
                output.print_json(shown | _as_data(contents, match))
            else:
                _print_lines(shown)
                _print_contents(contents, match)
    except CheckpointerError as error:
        output.print_json(shown) if as_json else _print_lines(shown)
        output.say(f"its tensors cannot be shown: {error}")
        output.leave_if(bad=True)


def _show_terms(catalog: Catalog, run: str, *, as_json: bool) -> None:
    terms = [one for known, label in catalog.named(run) for one in terms_of(catalog, known, label)]
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


def _lines_of(record: Record, path: str) -> dict[str, str]:
    """Return what a record says, as lines."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.time))
    epoch = f" (epoch {record.epoch}{', ended' if record.epoch_end else ''})"
    return {
        "name": record.name,
        "path": path,
        "aliases": "",
        "step": f"{record.step}{epoch if record.is_epoch_known else ''}",
        "metrics": ", ".join(f"{name}={number_text(value)}" for name, value in record.metrics.items()),
        "time": f"{when} ({age_text(time.time() - record.time)} ago)",
        "size": f"{size_text(record.size)} ({record.size} bytes)",
        "digest": record.digest,
        "format": f"{record.format}, {record.contents}",
        "run": f"{record.run}{f' ({record.label})' if record.label else ''}, commit {record.serial}",
        "kind": "" if record.kind == "regular" else record.kind,
        "why": "",
        "saved": record.reason,
    }


def _print_lines(lines: dict[str, str]) -> None:
    output.print_table(["", ""], [([(key, "bold")], value) for key, value in lines.items() if value])


def _print_contents(contents: Tensors, match: str) -> None:
    tensors = [info for info in contents.tensors.values() if match in info.name]
    output.print_line("")
    rows = [(info.name, info.kind, " x ".join(map(str, info.shape)) or "-", size_text(info.bytes)) for info in tensors]
    output.print_table(["tensor", "dtype", "shape", "bytes"], rows, right=["bytes"], folded=[0])
    total = size_text(sum(info.bytes for info in tensors))
    elements = count_text(sum(info.numel for info in tensors), "element")
    output.print_line(f"{count_text(len(tensors), 'tensor')}, {elements}, {total}")
    output.print_line(f"weights: {_where(contents)}")
    others = {key: value for key, value in contents.others.items() if match in key}
    if others:
        output.print_line("")
        output.print_table(["value", ""], [(key, str(value)) for key, value in others.items()], folded=[0, 1])
    if contents.calls:
        output.say(f"unpickling it would call {', '.join(contents.calls)}; nothing was unpickled")
