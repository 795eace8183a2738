"""What a report costs at which nothing is due, beside what other frameworks do at each step."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

from perf.builds import workers
from perf.rows import OURS, Row, rows_of
from perf.setup import Setup
from perf.sides import Cost, Side, interleaved

COUNT = 20_000
Step = Callable[[int], object]


def observed(setup: Setup) -> list[Row]:
    """One report."""
    with workers(setup.trees) as builds:
        sides: dict[str, Side | str] = {build.name: build.side("quiet", count=COUNT) for build in builds}
        for name, step in _steps().items():
            sides[name] = _Calls(step)
        taken = interleaved(sides, 7)
    rows = rows_of("observe when nothing is due", taken, OURS, unit="us", scale=1e6)
    least = taken[OURS].median(lambda cost: cost.wall_s)
    rows[0] = rows[0]._replace(goal=f"<= 1 us: {'reached' if least <= 1e-6 else 'missed'}")
    return rows


class _Calls:
    """A side that calls with ever larger numbers of steps."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._done = 0

    def __call__(self) -> Cost:
        first = self._done + 1
        self._done += COUNT
        start = time.perf_counter()
        for number in range(first, first + COUNT):
            self._step(number)
        return Cost((time.perf_counter() - start) / COUNT)


def _steps() -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for name, find in (
        ("Lightning hook", _lightning),
        ("Orbax should_save", _orbax),
        ("HF flow callback", _transformers),
        ("ignite event", _ignite),
    ):
        with contextlib.suppress(ImportError):
            steps[name] = find()
    return steps


def _lightning() -> Step:
    from run import _lightning_hook

    hook = _lightning_hook()
    if hook is None:
        raise ImportError("lightning")  # noqa: EM101
    return hook


def _orbax() -> Step:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(save_interval_steps=10**9)
    manager = ocp.CheckpointManager(tempfile.mkdtemp(), options=options)
    manager.should_save(0)
    return manager.should_save  # type: ignore[no-any-return]


def _transformers() -> Step:
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import DefaultFlowCallback

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), save_strategy="steps", save_steps=10**9, logging_strategy="no", report_to=[]
    )
    flow, state, control = DefaultFlowCallback(), TrainerState(max_steps=10**10), TrainerControl()
    state.save_steps = 10**9

    def step(number: int) -> None:
        state.global_step = number
        flow.on_step_end(arguments, state, control)

    return step


def _ignite() -> Step:
    from ignite.engine import Engine, Events

    engine: Any = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=10**9), lambda engine: None)

    def step(number: int) -> None:
        engine.state.iteration = number
        engine.fire_event(Events.ITERATION_COMPLETED)

    return step
