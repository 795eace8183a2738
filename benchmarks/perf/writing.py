"""How many bytes go to the disk for thirty saves under "best three and last"."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from checkpointer import CheckpointManager, EverySteps, KeepBest, Policy
from perf.rows import OURS, Row, named
from perf.setup import Setup
from perf.sides import State, folder, state_of

LOSSES = [1 / n for n in range(1, 31)]
"""Each is the best so far, so that each side saves thirty times."""


def bytes_written(_: Setup) -> list[Row]:
    """Bytes given to write calls, per payload byte."""
    state = state_of(8, 4)
    size = sum(tensor.nbytes for tensor in state.values()) * len(LOSSES)
    taken: dict[str, float] = {}
    with folder() as path:
        taken[OURS] = _ours(f"{path}/ours", state) / size
        with contextlib.suppress(ImportError):
            taken["Lightning"] = _lightning(f"{path}/lightning") / size
        with contextlib.suppress(ImportError):
            taken["ignite"] = _ignite(f"{path}/ignite", state) / size
    rows = [Row("", who, f"{ratio:.2f} x", "payload", f"{ratio:.2f} x") for who, ratio in taken.items()]
    rows[0] = rows[0]._replace(goal="1.0 x")
    return named("bytes of 30 saves, best 3 + last", rows)


def _written() -> int:
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def _ours(where: str, state: State) -> int:
    policy = Policy(EverySteps(1), [KeepBest(3, "loss", mode="min")], last="copy")
    before = _written()
    with CheckpointManager(where, policy, state=lambda: state) as manager:
        for n, loss in enumerate(LOSSES, 1):
            assert manager.observe({"loss": loss}, step=n, epoch=0, epoch_end=False)
    return _written() - before


def _lightning(where: str) -> int:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(8 * 2**18))

        def training_step(self, batch: Any, index: int) -> Any:
            self.log("loss", LOSSES[self.current_epoch])
            return self.w[0] * 0

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = ModelCheckpoint(where, monitor="loss", save_top_k=3, save_last=True, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        max_epochs=30, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[callback], log_every_n_steps=1,
    )  # fmt: skip
    before = _written()
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1, 1))))
    return _written() - before


def _ignite(where: str, state: State) -> int:
    from ignite.engine import Engine
    from ignite.handlers import ModelCheckpoint

    model = torch.nn.ParameterList(state.values())
    engine: Any = Engine(lambda engine, batch: None)
    best = ModelCheckpoint(
        where, "best", n_saved=3, score_function=lambda engine: -engine.state.metrics["loss"], create_dir=True,
        require_empty=False,
    )  # fmt: skip
    last = ModelCheckpoint(where, "last", n_saved=1, create_dir=True, require_empty=False)
    before = _written()
    for n, loss in enumerate(LOSSES, 1):
        engine.state.iteration = n
        engine.state.metrics = {"loss": loss}
        best(engine, {"model": model})
        last(engine, {"model": model})
    return _written() - before
