"""What a person sees of the values: one line in a terminal, a small table in a notebook, the plan at the start."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from checkpointer import Budget, CheckpointManager, EverySteps, KeepBest, KeepLast, Policy, Skip
from checkpointer.testing import MemoryStorage

POLICY = Policy(
    EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1), Budget(bytes=10**9)], last="link", name="{loss}"
)


@pytest.fixture
def manager() -> CheckpointManager:
    manager = CheckpointManager(MemoryStorage(), POLICY, state=lambda: {"w": 1})
    manager.observe({"loss": 0.5, "<b>": 2.0}, 1, 0, epoch_end=False)
    manager.observe({"loss": 0.4}, 2, 0, epoch_end=False)
    return manager


def test_values_say_themselves_in_a_line(manager: CheckpointManager) -> None:
    """`print` of a decision and of a record."""
    decision = manager.observe({"loss": 0.3}, 3, 0, epoch_end=False)
    expected = (
        "save loss=0.3.ckpt: step 3 reached a multiple of 1; kept: the best by loss (min) and the newest; "
        "retires loss=0.4.ckpt"
    )
    assert expected == str(decision)
    assert str(manager.records[-1]).startswith("loss=0.3.ckpt: step 3, epoch 0; loss=0.3; ")
    assert "attach metrics to loss=0.3.ckpt: " in str(manager.observe({"loss": 0.2}, 3, 0, epoch_end=False))
    assert "skip: not due" == str(Skip(reason="not due"))


def test_values_show_themselves_in_a_notebook_with_names_escaped(manager: CheckpointManager) -> None:
    """A metric's name may be anything, also when it comes from storage."""
    manager.observe({"<b>": 1.0}, 2, 0, epoch_end=False)
    shown: list[Any] = [manager, manager.policy, manager.records[-1]]
    pages = [value._repr_html_() for value in shown]
    decision: Any = manager.observe({"loss": 0.1}, 3, 0, epoch_end=False)
    pages.append(decision._repr_html_())

    assert "&lt;b&gt;=1" in pages[0]
    assert "save every step; keep the best by loss (min) and the newest" in pages[0]
    assert "the best by loss (min)<br>the newest" in pages[1]
    assert "at most 1 GB" in pages[1]
    assert "&lt;b&gt;=1" in pages[2]
    assert "retires" in pages[3]
    assert not [page for page in pages if "<b>" in page]


def test_the_plan_is_said_once_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """At INFO, so that a program that logs shows it."""
    with caplog.at_level(logging.INFO, logger="checkpointer"):
        CheckpointManager(None, POLICY, state=dict).observe({"loss": 0.5}, 1, 0, epoch_end=False)

    plan = (
        "save every step; keep the best by loss (min) and the newest, at most 1 GB; "
        "last.ckpt is a link to the newest checkpoint, so every due checkpoint is saved, even if no rule keeps it"
    )
    assert [f"memory: {plan}"] == caplog.messages
