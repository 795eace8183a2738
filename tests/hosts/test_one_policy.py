"""One policy, three hosts: the same training leaves the same records, and each host loads what another has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpointer_torch import load_weights
from scripted import HOSTS, NAMES, Net, run, walk

from checkpointer import (
    AnyOf,
    AtSteps,
    CheckpointManager,
    Continuous,
    EveryCount,
    EveryEpochs,
    EveryFraction,
    EverySteps,
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    KeepWhere,
    OnImprovement,
    Policy,
    Progress,
    Record,
    When,
)

Make = Callable[[str, str], Policy]
"""Makes a policy from what the host calls the losses of training and validation."""


def is_third(now: Progress) -> bool:
    """Return whether it is a step such as 3, 6 and 9."""
    return now.step % 3 == 0


def is_even(record: Record) -> bool:
    """Return whether its step is even."""
    return record.step % 2 == 0


POLICIES: dict[str, Make] = {
    "last of every 5 steps": lambda loss, val: Policy(EverySteps(5), [KeepLast(1)]),
    "two of every 3 steps, link": lambda loss, val: Policy(EverySteps(3), [KeepLast(2)], last="link"),
    "best epochs": lambda loss, val: Policy(EveryEpochs(1), [KeepBest(2, val, mode="min")]),
    "worst epochs": lambda loss, val: Policy(EveryEpochs(1), [KeepBest(1, val, mode="max")]),
    "best and last epoch, links": lambda loss, val: Policy(
        EveryEpochs(1), [KeepBest(1, val, mode="min"), KeepLast(1)], last="link", best="link"
    ),
    "every second epoch": lambda loss, val: Policy(EveryEpochs(2), [KeepAll()]),
    "steps and epochs, best by training loss": lambda loss, val: Policy(
        AnyOf(EverySteps(5), EveryEpochs(1)), [KeepBest(2, loss, mode="min"), KeepLast(1)]
    ),
    "steps that end epochs, ranked after validation": lambda loss, val: Policy(
        EverySteps(4), [KeepBest(2, val, mode="min"), KeepLast(1)]
    ),
    "listed steps": lambda loss, val: Policy(AtSteps(1, 7, 11), [KeepAll()]),
    "after a warm-up, every fourth": lambda loss, val: Policy(EverySteps(2, after=5), [KeepEvery(steps=4)]),
    "newest of equals": lambda loss, val: Policy(EverySteps(1), [KeepBest(3, loss, mode="min", ties="newest")]),
    "fractions of the run, for an hour": lambda loss, val: Policy(EveryFraction(0.3, of=12), [KeepFor(3600)]),
    "only improvements": lambda loss, val: Policy(OnImprovement(val, mode="min"), [KeepAll()]),
    "a count and a function, kept by a function": lambda loss, val: Policy(
        AnyOf(EveryCount(loss, 2), When(is_third)), [KeepWhere(is_even), KeepLast(1)]
    ),
    "as often as possible": lambda loss, val: Policy(Continuous(0), [KeepLast(2)]),
    "two rankings": lambda loss, val: Policy(
        AnyOf(EverySteps(3), EveryEpochs(1)), [KeepBest(1, loss, mode="min"), KeepBest(1, val, mode="min"), KeepLast(1)]
    ),
}


def records_of(host: str, directory: Path, policy: Policy) -> list[dict[str, Any]]:
    """Return what a training has left, best first, in terms that are the same for every host."""
    with CheckpointManager(directory, policy) as manager:
        ranked = [record.name for record in manager.policy.best_first(manager.session.manifest.history)]
        return [
            {
                "step": record.step,
                "epoch": record.epoch,
                "epoch_end": record.epoch_end,
                "kind": record.kind,
                "rank": ranked.index(record.name) if record.name in ranked else None,
                "metrics": {name: str(record.metrics.get(called)) for name, called in NAMES[host].items()},
                "reason": record.reason.replace(NAMES[host]["val_loss"], "val_loss"),
            }
            for record in manager.records
        ]


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_training_leaves_the_same_records_in_every_host(tmp_path: Path, name: str) -> None:
    """Steps, metrics, rank and reason; only what a host calls its files and metrics differs."""
    left = {}
    for host in HOSTS:
        policy = POLICIES[name](*NAMES[host].values())
        run(host, tmp_path / host, policy)
        left[host] = records_of(host, tmp_path / host, policy)

    assert left["loop"]
    assert left["loop"] == left["lightning"]
    assert left["loop"] == left["transformers"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each host, of step 8."""
    found = {}
    for host in HOSTS:
        directory = tmp_path_factory.mktemp(host)
        run(host, directory, Policy(AtSteps(8), [KeepAll()]))
        with CheckpointManager(directory) as manager:
            found[host] = directory / next(record.name for record in manager.records if record.step == 8)
    return found


@pytest.mark.parametrize("host", HOSTS)
def test_each_host_loads_the_weights_that_another_has_written(trained: dict[str, Path], host: str) -> None:
    """Files of the loop, of Lightning, folders of the Trainer: prefixes are found."""
    for checkpoint in trained.values():
        net = Net()
        load_weights(net, checkpoint)
        assert [8.0, 8.0] == [*walk(net)][:2]
