"""The flat arguments of Lightning's ModelCheckpoint, with their meanings and their refusals."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from support.factories import history, manifest, observation

from checkpointer.errors import PolicyError
from checkpointer.policy.decide import Save, decide
from checkpointer.policy.naming import Naming
from checkpointer.policy.policy import Policy
from checkpointer.policy.retention import KeepAll, KeepBest, KeepLast
from checkpointer.policy.triggers import AtSteps, EveryEpochs, EverySeconds, EverySteps

ZERO = Naming(missing="zero", rescue="template")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, Policy(EveryEpochs(1), [KeepLast(1)], name=ZERO, rescue=False)),
        (
            {"monitor": "val_loss", "save_top_k": 3},
            Policy(EveryEpochs(1), [KeepBest(3, "val_loss", mode="min", ties="incumbent")], name=ZERO, rescue=False),
        ),
        (
            {"monitor": "acc", "mode": "max"},
            Policy(EveryEpochs(1), [KeepBest(1, "acc", mode="max", ties="incumbent")], name=ZERO, rescue=False),
        ),
        ({"save_top_k": -1}, Policy(EveryEpochs(1), [KeepAll()], name=ZERO, rescue=False)),
        (
            {"monitor": "acc", "save_top_k": -1},
            Policy(
                EveryEpochs(1), [KeepAll(), KeepBest(1, "acc", mode="min", ties="incumbent")], name=ZERO, rescue=False
            ),
        ),
        ({"save_top_k": 0}, Policy(EveryEpochs(1), [], name=ZERO, rescue=False)),
        (
            {"save_top_k": 0, "save_last": True},
            Policy(EveryEpochs(1), [], name=ZERO, last="copy", rescue=False),
        ),
        ({"save_last": "link"}, Policy(EveryEpochs(1), [KeepLast(1)], name=ZERO, last="link", rescue=False)),
        ({"save_last": False}, Policy(EveryEpochs(1), [KeepLast(1)], name=ZERO, rescue=False)),
        ({"every_n_train_steps": 50}, Policy(EverySteps(50), [KeepLast(1)], name=ZERO, rescue=False)),
        (
            {"every_n_train_steps": 50, "every_n_epochs": 0},
            Policy(EverySteps(50), [KeepLast(1)], name=ZERO, rescue=False),
        ),
        ({"every_n_epochs": 2}, Policy(EveryEpochs(2), [KeepLast(1)], name=ZERO, rescue=False)),
        ({"every_n_epochs": 0}, Policy(AtSteps(), [KeepLast(1)], name=ZERO, rescue=False)),
        (
            {"train_time_interval": timedelta(minutes=1)},
            Policy(EverySeconds(60), [KeepLast(1)], name=ZERO, rescue=False),
        ),
        (
            {
                "filename": "{epoch}-{val_loss:.2f}",
                "auto_insert_metric_name": False,
                "enable_version_counter": False,
                "save_weights_only": True,
                "save_on_exception": True,
            },
            Policy(
                EveryEpochs(1),
                [KeepLast(1)],
                name=Naming(
                    "{epoch}-{val_loss:.2f}",
                    auto_insert=False,
                    version_counter=False,
                    missing="zero",
                    rescue="template",
                ),
                contents="weights",
            ),
        ),
    ],
)
def test_flags_become_a_policy(flags: dict[str, Any], expected: Policy) -> None:
    """Each flag is a translation to a part of a policy."""
    assert expected == Policy.from_flags(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"save_top_k": -2}, "save_top_k is -2; expected -1"),
        ({"save_top_k": 1.5}, "save_top_k is 1.5"),
        ({"save_top_k": True}, "save_top_k is True"),
        ({"save_top_k": 2}, "save_top_k=2 with monitor=None has nothing to rank by.*KeepLast"),
        ({"mode": "auto"}, "mode is 'auto'; expected 'min' or 'max'"),
        ({"save_last": "copy"}, "save_last is 'copy'; expected True, False, None or 'link'"),
        ({"every_n_train_steps": -1}, "every_n_train_steps is -1; expected a whole number"),
        ({"every_n_epochs": -1}, "every_n_epochs is -1"),
        ({"every_n_epochs": 1.0}, "every_n_epochs is 1.0"),
        ({"train_time_interval": timedelta(seconds=-1)}, "is -1.0; expected seconds of at least 0"),
        ({"every_n_train_steps": 1, "every_n_epochs": 1}, "every_n_train_steps and every_n_epochs are mutually excl"),
        (
            {"every_n_train_steps": 1, "train_time_interval": timedelta(seconds=1)},
            r"mutually exclusive; compose them instead: Policy\(when=AnyOf\(EverySteps\(n=1",
        ),
    ],
)
def test_what_lightning_refuses_is_refused(flags: dict[str, Any], message: str) -> None:
    """The error names the flag, the value and what to do instead."""
    with pytest.raises(PolicyError, match=message):
        Policy.from_flags(**flags)


def test_a_missing_template_field_is_zero() -> None:
    """As in Lightning, and only in this dialect."""
    policy = Policy.from_flags(filename="{epoch}-{val_loss:.2f}")
    decision = decide(policy, observation(epoch=0), manifest())
    assert isinstance(decision, Save)
    assert "epoch=0-val_loss=0.00.ckpt" == decision.name


def test_top_k_without_monitor_keeps_the_newest() -> None:
    """With save_top_k=1 and nothing to rank by, each save retires the one before."""
    decision = decide(Policy.from_flags(), observation(10, epoch=5), manifest(history(1.0)))
    assert isinstance(decision, Save)
    assert ("s1",) == decision.retire
