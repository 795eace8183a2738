"""What a GPU adds, measured and checked by one command: ``python benchmarks/on_gpu.py``, six minutes at most.

It needs one GPU, and no network. ``--device cpu`` is a dry run of the same code with a small state. The end status is 1
if a check failed. Timings are medians of turns; nothing asserts on them. (Not named cuda.py, because torch
imports a package ``cuda``, and would find this file.)
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
_PATH = [str(HERE), str(HERE.parent), str(HERE.parent / "adapters")]
sys.path[:0] = _PATH
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*_PATH, os.environ.get("PYTHONPATH")]))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Deterministic algorithms need it before torch is there.

import torch  # noqa: E402
from gpu import restoring, resuming, sharding, tests, training  # noqa: E402
from gpu.device import Run  # noqa: E402

Section = Callable[[Run], list[tuple[str, ...]]]
SECTIONS: dict[str, tuple[Section, int]] = {
    "resume": (resuming.checked, 40),
    "fsdp2": (sharding.checked, 20),
    "tests": (tests.checked, 40),
    "training": (training.measured, 150),
    "restore": (restoring.measured, 90),
}
"""Each with the seconds after which it makes no further turn."""
LIMIT_S = 340
"""No section begins later."""


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--megabytes", type=int, default=10_000, help="size of the state on the device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=".", help="on the disk that is written to")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, metavar="NAME", help=f"of {', '.join(SECTIONS)}")
    return parser.parse_args()


def main() -> int:
    """Run the sections; return the status."""
    options = arguments()
    warnings.simplefilter("ignore")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is here; --device cpu makes a dry run", file=sys.stderr)
        return 2
    start, failed, rows = time.monotonic(), [], []
    for name in options.only or SECTIONS:
        begun = time.monotonic()
        if begun - start > LIMIT_S:
            failed.append(f"{name}: no time was left")
            continue
        try:
            rows += section(name, options)
        except Exception:  # The other sections can still be run.
            failed.append(f"{name}:\n{traceback.format_exc()}")
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    report(rows, options.device)
    print("\n".join(f"FAILED {each}" for each in failed) or "all sections are through")
    return 1 if failed else 0


def section(name: str, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Run one section in a folder of its own."""
    call, seconds = SECTIONS[name]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        until = time.monotonic() + seconds
        return call(Run(options.device, options.megabytes, options.repeats, folder, until))


def report(rows: list[tuple[str, ...]], device: str) -> None:
    """Print the table as markdown, and where it was measured."""
    print("| measure | who | result | ratio to the first |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    what = torch.cuda.get_device_name() if device == "cuda" else f"dry run on the CPU, {os.cpu_count()} cores"
    print(f"\n{what}, torch {torch.__version__}, Python {platform.python_version()}")


if __name__ == "__main__":
    sys.exit(main())
