"""``checkpointer verify``: compare each checkpoint with its record."""

from __future__ import annotations

from typing import Annotated

import typer

from checkpointer._display import size_text
from checkpointer.cli import options, output
from checkpointer.errors import PolicyError
from checkpointer.tools.verify import Depth, Finding, verify_all


def verify_command(
    directory: options.Directory,
    access: options.Access,
    names: Annotated[
        list[str] | None, typer.Argument(help="Names, steps or aliases; none: all.", show_default=False)
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Look into each payload too, without unpickling it.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes only, and read no payload.")] = False,
    as_json: options.Json = False,
) -> None:
    """Compare payloads with the sizes and digests in their records. Nothing is loaded.

    Exits with 1 if a payload differs or is gone, or a record cannot be read.
    """
    if deep and quick:
        msg = "both --deep and --quick are given; pass one"
        raise PolicyError(msg)
    depth: Depth = "contents" if deep else "sizes" if quick else "digests"
    catalog = options.look(directory, access).with_missing
    records = [catalog.find(name) for name in names] if names else [*catalog.records]
    total = sum(record.size for record in records)
    with output.progress("verifying", total) as advance:
        findings = [*verify_all(catalog, records, depth, on_bytes=advance)]
    bad = [finding for finding in findings if not finding]
    if as_json:
        output.print_json(
            [
                {"name": f.name, "ok": bool(f), "problem": f.problem, "calls": f.calls, "retired": f.is_retired}
                for f in findings
            ]
        )
    else:
        for finding in findings:
            _print(finding)
        what = {"sizes": "by size", "digests": "by digest", "contents": "by digest, and looked into"}[depth]
        retired = sum(finding.is_retired for finding in findings)
        count = len(findings) - retired
        meanwhile = f", {retired} retired meanwhile" if retired else ""
        whole = f"{count - len(bad)} of {count} whole, {len(bad)} bad{meanwhile}"
        output.print_line(f"{whole}; {size_text(total)} {what}")
    output.leave_if(bool(bad))


def _print(finding: Finding) -> None:
    if not finding:
        output.print_line(f"BAD   {finding.name}: {finding.problem}")
        return
    if finding.is_retired:
        output.print_line(f"gone  {finding.name}: retired meanwhile")
        return
    calls = f"  (unpickling it would call {', '.join(finding.calls)})" if finding.calls else ""
    output.print_line(f"ok    {finding.name}{calls}")
