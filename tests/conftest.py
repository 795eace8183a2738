"""What every test shares."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
from support import sampling
from support.servers.fixtures import serve

__all__ = ["serve"]

# Programs that tests start find what they share too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

# The contract's assertions then show their values, like those of the tests themselves.
pytest.register_assert_rewrite("checkpointer.testing.contract")

# A loaded machine is slow now and then: time limits per example would fail tests that are right.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("steady")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts what it puts in the background so, and every process of a test would inherit it.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return sampling.described()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("CHECKPOINTER_SKIP_SLOW"):
        _skip(items, "slow", "slow (real kills, servers); unset CHECKPOINTER_SKIP_SLOW to run it")
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        _skip(items, "cuda", "needs a CUDA device")


def _skip(items: list[pytest.Item], mark: str, reason: str) -> None:
    for item in items:
        if mark in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder in memory where there is one: hundreds of trainings need not wait for a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


class NeedsHost(pytest.Module):
    """A test module that is not even imported."""

    def collect(self) -> list[pytest.Item]:
        """Skip the module, or fail it where ``CHECKPOINTER_REQUIRE`` names it."""
        host = _host_of(self.path)
        if host in os.environ.get("CHECKPOINTER_REQUIRE", "").split(","):
            pytest.fail(f"{host} is in CHECKPOINTER_REQUIRE, and is not installed", pytrace=False)
        pytest.skip(f"needs {host}: pip install 'torch-checkpointer[{host}]'", allow_module_level=True)


HOSTS = {
    "hosts": ("lightning", "transformers", "accelerate"),
    "lightning": ("lightning",),
    "transformers": ("transformers", "accelerate"),
    "ray": ("ray",),
}
"""What the tests of each host need."""


def _host_of(module: Path) -> str:
    """Return the host of a test module: its folder, but Ray has only one module."""
    return "ray" if module.name == "test_ray.py" else module.parent.name


def is_installed(package: str) -> bool:
    """Return whether it is; the folder of its tests, which may have that name too, has no file of its own."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if all(map(is_installed, HOSTS.get(_host_of(module_path), ()))):
        return None
    return NeedsHost.from_parent(parent, path=module_path)
