"""``checkpointer verify``: compare each checkpoint with its record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from checkpointer._display import count_text, size_text, some_of
from checkpointer.cli import options, output
from checkpointer.cli.choose_run import find_all
from checkpointer.errors import NotFoundError, PolicyError
from checkpointer.tools.checksums import verify_files
from checkpointer.tools.payloads import Payload
from checkpointer.tools.verify import Depth, Finding, verify_all


def verify_command(
    place: Annotated[str, options.argument("PLACE", "A directory of checkpoints, or any file or folder.")],
    access: options.Access,
    names: Annotated[
        list[str] | None,
        options.argument("[NAME]...", "Names, steps or aliases; default: all.", options.complete_name),
    ] = None,
    deep: Annotated[bool, options.option("--deep", "Look into each payload too, without unpickling it.")] = False,
    quick: Annotated[bool, options.option("--quick", "Compare sizes only, and read no payload.")] = False,
    run: options.Among = None,
    as_json: options.Json = False,
) -> None:
    """Compare payloads with the sizes and digests in their records. Nothing is loaded.

    Files without a record are compared with a checksum file beside them (model.pt.sha256, SHA256SUMS), else with the
    checksums in a torch file. Exits with 1 if a payload differs or is gone, or a record cannot be read.

    Example: checkpointer verify runs/digits --deep
    """
    if deep and quick:
        msg = "both --deep and --quick are given; pass one"
        raise PolicyError(msg)
    depth: Depth = "contents" if deep else "sizes" if quick else "digests"
    alone = None if names else options.payload_alone(place, access)
    if alone is not None and alone.catalog is None:
        _verify_files(alone, as_json=as_json)
        return
    catalog = options.look(place, access) if alone is None or alone.catalog is None else alone.catalog
    catalog = catalog.with_missing
    wanted = [alone.name] if alone is not None else names
    records = find_all(catalog, wanted, run) if wanted else catalog.of(run)
    total = sum(record.size for record in records)
    with output.progress("verifying", total) as advance:
        found = _printed(verify_all(catalog, records, depth, on_bytes=advance), silent=as_json)
    what = {"sizes": "by size", "digests": "by digest", "contents": "by digest, and looked into"}[depth]
    _end(found, f"{size_text(total)} {what}", as_json=as_json)


def _verify_files(payload: Payload, *, as_json: bool) -> None:
    """Verify what has no record."""
    found = _printed(verify_files(payload.storage, payload.name), silent=as_json, with_record=False)
    compared = [finding for finding in found if finding.by or finding.problem]
    if not compared:
        msg = (
            f"nothing in {payload.place} can be verified: it has no record and no checksum file "
            "(such as SHA256SUMS), and it is neither a torch file nor safetensors"
        )
        raise NotFoundError(msg)
    others = len(found) - len(compared)
    left = f"; {count_text(others, 'other file')} could not be compared" if others else ""
    _end(compared, f"no record{left}", as_json=as_json)


def _printed(findings: Iterable[Finding], *, silent: bool, with_record: bool = True) -> list[Finding]:
    """Return the findings. Each is printed at once, so that Ctrl-C loses none.

    A file without a record is left out if there was nothing to compare it with.
    """
    found = []
    for finding in findings:
        found.append(finding)
        if not silent and (with_record or finding.by or finding.problem):
            _print(finding)
            output.flush()
    return found


def _end(found: list[Finding], how: str, *, as_json: bool) -> None:
    bad = [finding for finding in found if not finding]
    if as_json:
        output.print_json([
            {"name": f.name, "ok": bool(f), "problem": f.problem, "calls": f.calls, "by": f.by, "retired": f.is_retired}
            for f in found
        ])  # fmt: skip
    else:
        retired = sum(finding.is_retired for finding in found)
        count, meanwhile = len(found) - retired, f", {retired} retired meanwhile" if retired else ""
        output.print_line(f"{count - len(bad)} of {count} whole, {len(bad)} bad{meanwhile}; {how}")
    output.leave_if(bool(bad))


def _print(finding: Finding) -> None:
    if not finding:
        output.print_marked("BAD", "red", f"   {finding.name}: {finding.problem}")
        return
    if finding.is_retired:
        output.print_line(f"gone  {finding.name}: retired meanwhile")
        return
    calls = f"  (unpickling it would call {some_of(finding.calls, 3)})" if finding.calls else ""
    by = f": {finding.by}" if finding.by else ""
    output.print_line(f"ok    {finding.name}{by}{calls}")
