"""One long table of what saves and restores cost, beside what a user would take instead: ``make bench-performance``.

``--before REV`` measures another commit of this library too. The sides of a row take turns on one disk: each build
in a process of its own, the peers in this one. Medians are printed, the range, and the ratio to the column *beside*.
Timings on a busy machine are noisy; nothing here is a test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata

from perf import losing, many, observing, remembering, restoring, saving, writing
from perf.builds import trees
from perf.peers import find
from perf.rows import Row, markdown
from perf.setup import Setup

MEASURES: dict[str, Callable[[Setup], list[Row]]] = {
    "observe": observing.observed,
    "durable": saving.durable,
    "blocked": saving.blocked,
    "blocked-many": saving.blocked_by_many,
    **losing.MEASURES,
    "restore": restoring.restored,
    "mmap": restoring.mapped,
    "bytes": writing.bytes_written,
    "memory": remembering.memory,
    "many": many.with_many,
}

IN_FRESH_MEMORY = ("restore", "mmap")
FRESH = {"MALLOC_MMAP_THRESHOLD_": str(12 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}
"""Tensors, which have 16 MB, get new pages; smaller buffers are used again, as they are anyhow."""


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the state")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--before", metavar="REV", help="a commit or tag that is measured beside this build")
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[10, 1000, 10_000])
    parser.add_argument("--many-tensors", type=int, default=20_000, help="of 4 kB each")
    parser.add_argument("--only", nargs="*", choices=MEASURES, metavar="NAME", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_fresh_memory(name: str, options: argparse.Namespace) -> list[Row]:
    """Run a measure in a process that always has new pages for tensors.

    A program restores once, into memory that it has never used. The allocator gives freed memory to the sides that come
    later: then one and the same load takes a third of the time.
    """
    sizes = ["--megabytes", str(options.megabytes), "--repeats", str(options.repeats)]
    before = ["--before", options.before] if options.before else []
    command = [sys.executable, __file__, *sizes, *before, "--only", name, "--json"]
    run = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **FRESH}, check=True)
    return [Row(*row) for row in json.loads(run.stdout)]


def machine(peers_versions: str, before: str | None) -> str:
    """Return a sentence about where and with what this was measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    build = f"beside {before}; " if before else ""
    versions = f"Python {platform.python_version()}, torch {metadata.version('torch')}; {peers_versions}"
    return f"{os.cpu_count()} cores, {memory:.0f} GB; {build}load {os.getloadavg()[0]:.1f} at the end. {versions}."


def main() -> None:
    """Measure and print."""
    options = arguments()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that the folders, and the other commit's, are removed.
    peers, missing = find()
    rows: list[Row] = []
    with trees(options.before) as builds:
        setup = Setup(options.megabytes, options.repeats, peers, builds, options.checkpoints, options.many_tensors)
        for name in options.only or MEASURES:
            start = time.perf_counter()
            is_apart = name in IN_FRESH_MEMORY and not options.json
            rows += (new := in_fresh_memory(name, options) if is_apart else MEASURES[name](setup))
            if not options.json:
                print(markdown(new), file=sys.stderr)
                print(f"{name}: {time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    if options.json:
        print(json.dumps(rows))
        return
    print(markdown(rows))
    print()
    print(machine("; ".join(peer.version() for peer in peers), options.before))
    for what in missing:
        print("not installed:", what)


if __name__ == "__main__":
    main()
