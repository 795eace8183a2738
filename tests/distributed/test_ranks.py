"""Several processes (gloo): what one says reaches all, what fails on one is seen by all, and they talk seldom."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from support.together import DiedError, together

from checkpointer.distributed.ranks import Agreement, OneRank, TorchRanks, on_every_rank, on_rank_zero
from checkpointer.errors import ClosedError, RanksError, SaveError

STEP_S = 0.005


def fail() -> None:
    raise SaveError("no room")


class UnsendableError(Exception):
    """Takes more arguments than an exception that was pickled gets back."""

    def __init__(self, name: str, value: int) -> None:
        super().__init__(f"{name} is {value}")


def fail_unsendable() -> None:
    raise UnsendableError("x", 3)


def failure_of(work: Callable[[], Any]) -> tuple[str, str]:
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def talk(rank: int) -> Any:
    ranks = TorchRanks()
    failures = [
        failure_of(lambda: on_rank_zero(ranks, fail)),
        failure_of(lambda: on_rank_zero(ranks, fail_unsendable)),
        failure_of(lambda: on_every_rank(ranks, fail if rank == 1 else OneRank)),
    ]
    said = (
        ranks.broadcast({"from": rank}),
        ranks.gather(rank),
        ranks.highest(rank, -rank),
        on_rank_zero(ranks, lambda: f"by {rank}"),
        on_every_rank(ranks, lambda: rank * 2),
    )
    ranks.close()
    with pytest.raises(ClosedError):
        ranks.gather(rank)
    return said, failures


@pytest.mark.slow
def test_what_one_rank_says_or_fails_with_reaches_all() -> None:
    """Nobody waits for a rank that failed: the same error is raised everywhere, as text where it cannot be sent."""
    first, second = together(2, talk)

    assert ({"from": 0}, [0, 1], (1.0, 0.0), "by 0", [0, 2]) == first[0] == second[0]
    assert [
        ("SaveError", "no room"),
        ("UnsendableError", "x is 3"),
        ("RanksError", "rank 1 failed: SaveError('no room')"),
    ] == first[1]
    assert [("SaveError", "no room"), ("RanksError", "UnsendableError: x is 3"), ("SaveError", "no room")] == second[1]


def agree(rank: int, at: int) -> Any:
    agreement = Agreement(TorchRanks())
    steps = []
    for step in range(400):
        time.sleep(STEP_S if step < 300 else STEP_S / 5)
        if agreement(rank == 1 and step == at):
            steps.append(step)
    return steps, agreement.num_exchanges


@pytest.mark.slow
def test_all_ranks_hear_of_a_flag_at_the_same_step_and_talk_seldom() -> None:
    """It is raised on one of them only, between two talks."""
    (steps, talks), (other_steps, other_talks) = together(2, agree, 123)

    assert steps == other_steps
    assert 1 == len(steps)
    assert 123 <= steps[0]
    assert talks == other_talks
    assert talks < 400


def die(rank: int) -> str:
    ranks = TorchRanks()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        Agreement(ranks)(False)
    except RuntimeError as error:
        return type(error).__name__
    return "agreed"


@pytest.mark.slow
def test_a_rank_that_died_is_an_error_on_the_others() -> None:
    """It is not waited for until a timeout."""
    alive, dead = together(2, die)

    assert alive != "agreed"
    assert isinstance(dead, DiedError)


@attrs.define
class Scripted:
    """Two ranks whose talking costs what a test says, on a clock that it moves."""

    cost_s: float
    now: float = 0.0
    rank: int = 0
    size: int = 2

    def time(self) -> float:
        return self.now

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def barrier(self, timeout_s: float) -> bool:
        return True

    def highest(self, *values: float) -> tuple[float, ...]:
        self.now += self.cost_s
        return values


@attrs.define
class Late(Scripted):
    """The other rank comes 3 ms later; its talks take ``cost_s``, and each fourth five times that."""

    talks: int = 0

    def highest(self, *values: float) -> tuple[float, ...]:
        before = self.cost_s * (1 if self.talks % 4 else 5)
        self.talks += 1
        self.now += 0.003 + self.cost_s * (1 if self.talks % 4 else 5)
        return (*values[:2], max(values[2], -before))


@pytest.mark.parametrize("step_s", [0.0001, 0.005, 0.3, 5.0])
def test_talking_costs_two_thousandths_of_the_time_and_is_never_far_apart(step_s: float) -> None:
    """Steps may be short or long: after a moment, a talk of 0.2 ms costs 0.2 %, and one comes each second at least."""
    ranks = Scripted(cost_s=0.0002)
    agreement = Agreement(ranks, clock=ranks.time)
    gaps, since = [], 0.0
    for step in range(20_000):
        ranks.now += step_s
        talks = agreement.num_exchanges
        agreement(False)
        if agreement.num_exchanges > talks:
            gaps.append(ranks.now - since)
            since = ranks.now
        if step == 5_000:
            talks_then, then = agreement.num_exchanges, ranks.now

    spent = (agreement.num_exchanges - talks_then) * 0.0002
    assert spent <= 0.00202 * (ranks.now - then) + 0.0002
    assert max(gaps) <= max(1.0, step_s) + step_s + 0.001


def test_what_talking_costs_is_what_it_takes_the_rank_that_comes_last() -> None:
    """On average: a rank that comes early waits as it would in the step, and the quickest talk says too little."""
    ranks = Late(cost_s=0.0001)
    agreement = Agreement(ranks, clock=ranks.time)
    talks, then = 0, 0.0
    for step in range(20_000):
        ranks.now += 0.005
        agreement(False)
        if step == 5_000:
            talks, then = agreement.num_exchanges, ranks.now
    # This rank waits 3 ms each time; the other one's talk takes 0.1 ms, and each fourth 0.5 ms: on average 0.2 ms.
    share = (agreement.num_exchanges - talks) * 0.0002 / (ranks.now - then)
    assert 0.0015 < share < 0.00202


def test_one_process_agrees_with_itself_at_once() -> None:
    """The same code runs without torch.distributed."""
    agreement = Agreement(OneRank())

    assert [False, True, False] == [agreement(flag) for flag in (False, True, False)]
    assert 0 == agreement.num_exchanges
    assert [3] == on_every_rank(OneRank(), lambda: 3)


def test_ranks_without_a_process_group_are_an_error_that_says_what_to_do() -> None:
    """The message names the call that is missing."""
    with pytest.raises(RanksError, match="init_process_group"):
        TorchRanks()
