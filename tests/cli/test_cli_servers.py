"""The commands on real servers: what they do with a path they do with a URL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.commands import Said, command, train
from support.servers.fixtures import Serve

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepBest, Policy

pytestmark = pytest.mark.slow

POLICY = Policy(EverySteps(1), [KeepAll(), KeepBest(1, "loss", mode="min")], last="copy", best="copy")


@pytest.mark.parametrize("kind", ["s3", "rclone", "sftp", "gcs"])
def test_every_command_takes_a_url(kind: str, serve: Serve, tmp_path: Path) -> None:
    """A run goes up, is looked at, verified, averaged and pruned there, and comes back."""
    server = serve(kind)
    url, options = server.fresh(), json.dumps(dict(server.storage_options))
    run = train(tmp_path / "run", 0.9, 0.2, 0.5, policy=POLICY)

    def there(name: str, *argv: object) -> Said:
        said = command(name, url, *argv, "--storage-options", options)
        assert 0 == said.code, said.err
        return said

    assert 0 == command("copy", run, url, "--target-options", options).code
    records = there("ls", "--json").data
    assert [10, 20, 30] == [record["step"] for record in records]
    assert there("best", "--by", "loss", "--mode", "min").out.strip().endswith("-step=20.ckpt")
    assert there("last").out.strip().endswith("-step=30.ckpt")
    if kind == "sftp":  # A time in whole seconds does not show of which checkpoint a file is a copy.
        said = command("best", url, "--storage-options", options)
        assert (2, True) == (said.code, "does not say which checkpoint its best alias is a copy of" in said.err), said
    else:
        assert there("best").out.strip().endswith("-step=20.ckpt")
    assert "2 x 3" in there("show", "20").out
    assert "3 of 3" in there("verify", "--deep").out
    there("average", "10", "30", "--out", tmp_path / "mean.safetensors")
    assert pytest.approx(0.7) == load_file(tmp_path / "mean.safetensors")["w"][0, 1].item()

    thrifty = tmp_path / "thrifty.yaml"
    Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")]).to_yaml(thrifty)
    there("prune", "--policy", thrifty, "--apply")
    left = [record["step"] for record in there("ls", "--json").data]
    assert 10 not in left
    assert 20 in left
    there("sweep")
    assert (1, "closed") == (
        (seen := command("watch", url, "--once", "--json", "--storage-options", options)).code,
        seen.data[0]["state"],
    )
    before = there("ls", "--json").data
    assert "durable in" in there("doctor", "--size", "1GB").out
    assert before == there("ls", "--json").data
    one = command("show", f"{url}/{before[0]['name']}", "--storage-options", options)
    assert (0, True) == (one.code, "2 x 3" in one.out), one

    said = command("copy", url, tmp_path / "back", "--storage-options", options)
    assert (0, kind == "sftp") == (said.code, "best.ckpt was not copied" in said.err), said
    with CheckpointManager(tmp_path / "back", POLICY) as manager:
        restored = manager.restore("best")
        assert restored is not None
        assert 20 == restored.step


TRAINING = """
import json, sys, time
from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from support.servers import KINDS
KINDS[sys.argv[3]].prepare_client()
policy, options = Policy(EverySteps(100), [KeepLast(2)]), json.loads(sys.argv[2])
with CheckpointManager(sys.argv[1], policy, state=lambda: {"w": 1}, lease_s=2, storage_options=options) as manager:
    for step in range(1, 10**9):
        manager.observe({"loss": 1 / step}, step=step, epoch=0, epoch_end=False)
        if step >= 150:
            print(step, flush=True)
            time.sleep(0.5)
"""


@pytest.mark.parametrize("kind", ["s3", "sftp"])
def test_a_training_on_a_server_is_watched_and_a_killed_one_too(kind: str, serve: Serve) -> None:
    """The last step comes with the heartbeat, and the exit code says whether it is alive."""
    server = serve(kind)
    url, options = server.fresh(), json.dumps(dict(server.storage_options))
    watch = ("watch", url, "--once", "--json", "--storage-options", options)
    argv = [sys.executable, "-c", TRAINING, url, options, kind]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        end = time.monotonic() + 60
        while (seen := command(*watch).data[0])["status"] is None or seen["status"]["step"] < 150:
            assert time.monotonic() < end, seen
        assert ("alive", 100, "step 200") == (seen["state"], seen["newest"]["step"], seen["due"])
        assert 0 == command(*watch).code
        process.kill()
    said = command(*watch)
    assert (1, "killed", 100) == (said.code, said.data[0]["state"], said.data[0]["newest"]["step"])


def test_a_server_that_is_not_there_is_said_in_one_line(serve: Serve) -> None:
    """Exit code 2, half a minute later, and no password in it."""
    options = {**serve("s3").storage_options, "endpoint_url": "http://127.0.0.1:9", "secret": "hunter2"}
    said = command("ls", "s3://bucket/absent", "--storage-options", json.dumps(options))
    assert (2, "") == (said.code, said.out)
    assert "hunter2" not in said.err
    assert "s3://bucket/absent" in said.err
