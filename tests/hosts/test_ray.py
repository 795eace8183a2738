"""Two workers of Ray Train, killed: Ray starts both again, and the training goes on to the same weights."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
from support.sampling import EVERY, FIRST, third
from support.servers.fixtures import Serve

from checkpointer import CheckpointManager, EverySteps, KeepBest, Policy
from checkpointer.storage import open_storage

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples/digits_ray.py"
PATIENCE_S = 300.0
EPOCHS = 6
POLICY = Policy(EverySteps(1), [KeepBest(3, "val_loss", mode="min")])
PLACES = ["folder", "bucket"]

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # It asks its workers as often whether they live.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # Each of them starts processes that no test needs.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
"""Of Ray's processes here. One run takes some 30 s of CPU time: each of its 18 processes imports what it needs anew."""


@attrs.frozen
class Run:
    """The example as a process of its own, with a cluster of its own."""

    driver: subprocess.Popen[bytes]
    directory: str
    output: Path

    def workers(self) -> list[int]:
        """Return the process ids of the workers that train now."""
        return [pid for pid in _below(self.driver.pid) if "RayTrainWorker" in _command(pid)]

    def wait_for_save(self, number: int) -> None:
        """Wait until so many more checkpoints were saved."""
        seen, give_up = _saved(self.directory), time.monotonic() + PATIENCE_S
        while len(_saved(self.directory) - seen) < number:
            assert self.driver.poll() is None, self.output.read_text()
            assert time.monotonic() < give_up, "the training does not save"
            time.sleep(0.05)  # Each look at a bucket takes CPU time from the training.

    def end(self) -> tuple[int, str]:
        """Return the driver's exit code and all that was printed."""
        return self.driver.wait(PATIENCE_S), self.output.read_text()


def start(folder: Path, directory: str | None = None, cluster: str = "") -> Run:
    """Start the example. Without a directory it saves into the folder, where its output is.

    Without the address of a cluster it starts one of its own.
    """
    directory, output = directory or str(folder / "run"), folder / f"output-{time.monotonic()}.txt"
    command = [sys.executable, str(EXAMPLE), "--directory", directory, "--storage", str(folder / "ray")]
    with output.open("wb") as stream:
        driver = subprocess.Popen(
            [*command, "--epochs", str(EPOCHS)],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT} | ({"RAY_ADDRESS": cluster} if cluster else {}),
        )
    return Run(driver, directory, output)


def _saved(directory: str) -> set[str]:
    return {path for path in open_storage(directory, "").list() if path.startswith("epoch") and "/" not in path}


def _below(pid: int) -> list[int]:
    """Return all processes that this one has started, and those that they have started."""
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    found = [pid]
    for one in found:  # It grows meanwhile.
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def weights(output: str) -> str:
    """Return the digest of the weights that a run has ended with."""
    (digest,) = re.findall(r"^weights xxh3-128 (\w+)$", output, re.MULTILINE)
    return str(digest)


def begins(output: str) -> list[int]:
    """Return the steps that the workers have begun with."""
    return [int(step) for step in re.findall(r"begins at step (\d+)", output)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run that nothing interrupts."""
    code, output = start(tmp_path_factory.mktemp("unbroken")).end()
    assert 0 == code, output
    return weights(output)


@pytest.fixture(params=PLACES if EVERY == 1 else [PLACES[FIRST % 2]])
def place(request: pytest.FixtureRequest, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory on disk, or one in a bucket that all processes find by their environment."""
    if request.param == "folder":
        return str(tmp_path / "run")
    server = serve("s3")
    options = server.storage_options
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return server.fresh()


def test_killed_workers_are_started_again_and_end_with_the_same_weights(
    tmp_path: Path, unbroken: str, place: str
) -> None:
    """First one of them is killed, then the other one, then both; in CI one of the three. Ray finds the best one."""
    run, strikes = start(tmp_path, place), third([slice(0, 1), slice(1, 2), slice(0, 2)])
    for which in strikes:
        run.wait_for_save(2)
        for pid in run.workers()[which]:
            os.kill(pid, signal.SIGKILL)
    code, output = run.end()
    assert 0 == code, output
    assert unbroken == weights(output)
    assert 1 + len(strikes) == len(set(begins(output))), output
    best = CheckpointManager(place, POLICY).best
    assert best is not None
    assert f"best: {best.name}" in output.splitlines()


@pytest.mark.skipif(EVERY > 1, reason="a minute and a half for each of the two: make ray runs them")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_was_stopped_goes_on_when_it_runs_again(
    tmp_path: Path, unbroken: str, number: signal.Signals
) -> None:
    """Its workers end with it. They have no time for a rescue: the newest checkpoint counts."""
    run = start(tmp_path)
    run.wait_for_save(3)
    run.driver.send_signal(number)
    code, output = run.end()
    assert 0 != code, output
    code, output = start(tmp_path).end()
    assert 0 == code, output
    assert 0 < min(begins(output))
    assert unbroken == weights(output)


@pytest.mark.skipif(EVERY > 1, reason="two minutes: make ray runs it")
def test_when_its_node_is_lost_a_training_goes_on_on_another_one(
    tmp_path: Path, unbroken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The raylet of the node is killed, which takes the workers with it."""
    from ray.cluster_utils import Cluster

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        first = cluster.add_node(num_cpus=2)
        run = start(tmp_path, cluster=cluster.address)
        run.wait_for_save(2)
        cluster.add_node(num_cpus=2)
        first.kill_raylet()
        code, output = run.end()
    finally:
        cluster.shutdown()
    assert 0 == code, output
    assert unbroken == weights(output)
    assert 2 == len(set(begins(output))), output
