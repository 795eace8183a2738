"""Several processes (gloo): values and errors of one rank reach all, and they communicate seldom."""

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


def exchange(rank: int) -> Any:
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
    """The same error is raised on every rank, as text if it cannot be sent."""
    first, second = together(2, exchange)

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
def test_all_ranks_get_a_flag_at_the_same_step_and_communicate_seldom() -> None:
    """It is set on one of them only, between two exchanges."""
    (steps, count), (other_steps, other_count) = together(2, agree, 123)

    assert steps == other_steps
    assert 1 == len(steps)
    assert 123 <= steps[0]
    assert count == other_count
    assert count < 400


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
    """Two ranks whose exchange costs as long as the test sets, on a clock that it moves."""

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
    """The other rank comes 3 ms later; its exchanges take ``cost_s``, and each fourth five times that."""

    count: int = 0

    def highest(self, *values: float) -> tuple[float, ...]:
        before = self.cost_s * (1 if self.count % 4 else 5)
        self.count += 1
        self.now += 0.003 + self.cost_s * (1 if self.count % 4 else 5)
        return (*values[:2], max(values[2], -before))


@pytest.mark.parametrize("step_s", [0.0001, 0.005, 0.3, 5.0])
def test_agreeing_costs_two_thousandths_of_the_time_and_is_never_far_apart(step_s: float) -> None:
    """For short and long steps: soon an exchange of 0.2 ms costs 0.2 %, and the ranks make one each second at least."""
    ranks = Scripted(cost_s=0.0002)
    agreement = Agreement(ranks, clock=ranks.time)
    gaps, since = [], 0.0
    for step in range(20_000):
        ranks.now += step_s
        count = agreement.num_exchanges
        agreement(False)
        if agreement.num_exchanges > count:
            gaps.append(ranks.now - since)
            since = ranks.now
        if step == 5_000:
            count_then, then = agreement.num_exchanges, ranks.now

    spent = (agreement.num_exchanges - count_then) * 0.0002
    assert spent <= 0.00202 * (ranks.now - then) + 0.0002
    assert max(gaps) <= max(1.0, step_s) + step_s + 0.001


def test_an_exchange_costs_what_it_takes_the_rank_that_comes_last() -> None:
    """On average: a rank that comes early waits as it would in the step, and the quickest exchange is too short."""
    ranks = Late(cost_s=0.0001)
    agreement = Agreement(ranks, clock=ranks.time)
    count, then = 0, 0.0
    for step in range(20_000):
        ranks.now += 0.005
        agreement(False)
        if step == 5_000:
            count, then = agreement.num_exchanges, ranks.now
    # This rank waits 3 ms each time; the other one's exchange takes 0.1 ms, and each fourth 0.5 ms: on average 0.2 ms.
    share = (agreement.num_exchanges - count) * 0.0002 / (ranks.now - then)
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
