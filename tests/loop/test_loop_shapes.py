"""Every shape of loop that people write is saved, killed twice, and ends with the bits of one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import xxhash
from checkpointer_torch import Loop
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from checkpointer import AnyOf, CheckpointerWarning, EveryEpochs, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.errors import ObservationError

Tick = Callable[[int], None]
"""Is called within each step, with its number."""
Shape = Callable[[Path, Tick, bool], "list[torch.Tensor]"]

STEPS = Policy(EverySteps(3), [KeepBest(1, "val", mode="min"), KeepLast(1)], rescue=False)
EPOCHS = Policy(AnyOf(EverySteps(4), EveryEpochs(1)), [KeepBest(1, "acc", mode="max"), KeepLast(1)], rescue=False)


class KilledError(Exception):
    """Ends a training as a kill would: no rescue is made, and the manager is not closed."""


@attrs.define
class Kill:
    """A tick that ends the training at a step."""

    step: int

    def __call__(self, step: int) -> None:
        """Raise there."""
        if step == self.step:
            raise KilledError


def opened(directory: Path, policy: Policy, background: bool, **objects: Any) -> Loop:
    """Return a loop that listens to no signals."""
    return Loop(
        directory, policy, options={"background": "wait" if background else None}, stop_on=(), save_on=(), **objects
    )


def gpt(directory: Path, tick: Tick, background: bool) -> list[torch.Tensor]:
    """Train by iterations: the next batch is drawn at the end of the body, and a validation comes every 5 steps."""
    text = torch.arange(200) % 11
    torch.manual_seed(0)
    embedding, head = nn.Embedding(11, 8), nn.Linear(8, 11)
    model = nn.Sequential(embedding, nn.Dropout(0.2), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(text) - 9, (4,))
        return torch.stack([text[i : i + 8] for i in starts]), torch.stack([text[i + 1 : i + 9] for i in starts])

    inputs, targets = get_batch()
    best = 1e9
    with opened(
        directory,
        STEPS,
        background,
        model=model,
        optimizer=optimizer,
        batch=lambda: (inputs, targets),
        best=lambda: best,
    ) as loop:
        loop.resume()
        (inputs, targets), best = loop["batch"], loop["best"]
        for step in loop.steps(14):
            loss = functional.cross_entropy(model(inputs).transpose(1, 2), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            tick(step)
            optimizer.step()
            inputs, targets = get_batch()
            loop.step({"loss": loss.detach()})
            if step % 5 == 4:
                best = min(best, float(loss.detach()))
                loop.report({"val": best})
    return [*model.state_dict().values(), inputs, targets, torch.tensor(best)]


def imagenet(directory: Path, tick: Tick, background: bool) -> list[torch.Tensor]:
    """Train in epochs over a shuffled loader, with an accuracy after each."""
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(22, 3, 6, 6), torch.arange(22) % 4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loader = DataLoader(data, 4, shuffle=True)
    with opened(directory, EPOCHS, background, model=model, optimizer=optimizer, scheduler=scheduler, best=0.0) as loop:
        loop.resume()
        for _ in loop.epochs(3):
            model.train()
            for images, labels in loop.batches(loader):
                loss = functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                tick(loop.progress.step)
                optimizer.step()
                loop.step({"loss": loss.detach()})
            model.eval()
            hits = sum(float((model(images).argmax(1) == labels).sum()) for images, labels in DataLoader(data, 8))
            scheduler.step()
            loop["best"] = max(loop["best"], hits)
            loop.report({"acc": hits / len(data)})
    return [*model.state_dict().values(), torch.tensor([loop["best"], scheduler.get_last_lr()[0]])]


def gan(directory: Path, tick: Tick, background: bool) -> list[torch.Tensor]:
    """Train two models by two optimizers, in epochs; pictures of one noise are made now and then."""
    torch.manual_seed(0)
    fixed_noise = torch.randn(2, 3)
    real = DataLoader(TensorDataset(torch.rand(20, 4)), 4, shuffle=True, drop_last=True)
    generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=0.01)
    optimizer_d = torch.optim.Adam(critic.parameters(), lr=0.01)
    objects = {"G": generator, "D": critic, "optimizer_G": optimizer_g, "optimizer_D": optimizer_d}
    policy = Policy(AnyOf(EverySteps(4), EveryEpochs(1)), [KeepLast(1)], rescue=False)
    with opened(directory, policy, background, **objects, fixed_noise=fixed_noise) as loop:
        loop.resume()
        for _ in loop.epochs(3):
            for (batch,) in loop.batches(real):
                fake = generator(torch.randn(4, 3))
                ones, zeros = torch.ones(4, 1), torch.zeros(4, 1)
                loss_of = functional.binary_cross_entropy_with_logits
                optimizer_d.zero_grad()
                loss_d = loss_of(critic(batch), ones) + loss_of(critic(fake.detach()), zeros)
                loss_d.backward()  # type: ignore[no-untyped-call]
                optimizer_d.step()
                tick(loop.progress.step)
                optimizer_g.zero_grad()
                loss_g = loss_of(critic(fake), ones)
                loss_g.backward()  # type: ignore[no-untyped-call]
                optimizer_g.step()
                loop.step({"loss_d": loss_d.detach(), "loss_g": loss_g.detach()})
    return [*generator.state_dict().values(), *critic.state_dict().values(), generator(fixed_noise)]


def recurrent(directory: Path, tick: Tick, background: bool) -> list[torch.Tensor]:
    """Train a language model by truncated backpropagation: its hidden state goes on from batch to batch."""
    torch.manual_seed(0)
    text = (torch.arange(4 * 33) * 7 % 13).view(4, 33)
    embedding, core, head = nn.Embedding(13, 8), nn.LSTM(8, 8, batch_first=True, dropout=0.0), nn.Linear(8, 13)
    model = nn.ModuleDict({"embedding": embedding, "core": core, "head": head})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    hidden, total = (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)), 0.0
    with opened(directory, EPOCHS, background, model=model, optimizer=optimizer, state=lambda: (hidden, total)) as loop:
        loop.resume()
        hidden, total = loop["state"]
        for _ in loop.epochs(2):
            if loop.progress.batch == 0:
                hidden, total = (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)), 0.0
            for start in loop.batches(range(0, 32, 4)):
                hidden = (hidden[0].detach(), hidden[1].detach())
                inputs, targets = text[:, start : start + 4], text[:, start + 1 : start + 5]
                output, hidden = core(embedding(inputs), hidden)
                loss = functional.cross_entropy(head(output).transpose(1, 2), targets)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                tick(loop.progress.step)
                nn.utils.clip_grad_norm_(model.parameters(), 0.25)
                optimizer.step()
                total += float(loss.detach())
                loop.step({"loss": loss.detach()})
            loop.report({"acc": -total})
    return [*model.state_dict().values(), *(state.detach() for state in hidden)]


class Walk:
    """An environment: a walk on a line, with noise of its own."""

    def __init__(self) -> None:
        self._noise = torch.Generator().manual_seed(5)
        self._at = torch.zeros(1)

    def step(self, action: float) -> tuple[torch.Tensor, float]:
        """Move, and return where one is and the reward."""
        self._at = (self._at + action + 0.1 * torch.randn(1, generator=self._noise)).clamp(-3, 3)
        return self._at, -float(self._at.abs())

    def state_dict(self) -> dict[str, Any]:
        """Return all of it."""
        return {"noise": self._noise.get_state(), "at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self._noise.set_state(state["noise"])
        self._at = state["at"]


def ppo(directory: Path, tick: Tick, background: bool) -> list[torch.Tensor]:
    """Roll a policy out in an environment, then update it a few times: a step is an update of the whole."""
    torch.manual_seed(0)
    model = nn.Linear(1, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    env, counters = Walk(), {"frames": 0, "rollout": 8}
    observation = torch.zeros(1)
    with opened(
        directory,
        STEPS,
        background,
        model=model,
        optimizer=optimizer,
        env=env,
        counters=counters,
        obs=lambda: observation,
    ) as loop:
        loop.resume()
        observation = loop["obs"]
        for step in loop.steps(10):
            seen, actions, rewards = [], [], []
            for _ in range(counters["rollout"]):
                with torch.no_grad():
                    action = torch.multinomial(functional.softmax(model(observation), 0), 1)
                seen.append(observation)
                actions.append(action)
                observation, reward = env.step(float(action) - 0.5)
                rewards.append(reward)
                counters["frames"] += 1
            gains = torch.tensor(rewards) - sum(rewards) / len(rewards)
            for _ in range(2):
                chosen = functional.log_softmax(model(torch.stack(seen)), 1).gather(1, torch.stack(actions))[:, 0]
                optimizer.zero_grad()
                loss = -(chosen * gains).mean()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            tick(step)
            loop.step({"val": -sum(rewards)})
    return [*model.state_dict().values(), observation, torch.tensor(counters["frames"])]


def stream(directory: Path, tick: Tick, background: bool) -> list[torch.Tensor]:
    """Train on an endless stream that knows its place, with a validation now and then that draws random numbers."""
    torch.manual_seed(0)
    place = {"next": 0}

    def endless() -> Iterator[torch.Tensor]:
        while True:
            place["next"] += 1
            yield torch.sin(torch.arange(4) * float(place["next"]))

    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = endless()
    with opened(directory, STEPS, background, model=model, optimizer=optimizer, place=place) as loop:
        loop.resume()
        for step in loop.steps():
            if step == 13:
                break
            batch = next(batches) + 0.1 * torch.rand(4)
            loss = (model(batch) - batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            tick(step)
            optimizer.step()
            loop.step({"val": float(torch.rand(1))} if step in (1, 2, 7) else {})
    return [*model.state_dict().values(), torch.tensor(place["next"])]


SHAPES: dict[str, Shape] = {shape.__name__: shape for shape in (gpt, imagenet, gan, recurrent, ppo, stream)}


def digest(shape: Shape, directory: Path, tick: Tick = lambda _: None, *, background: bool = False) -> str:
    """Return a digest that differs if two ends of a training differ in a single bit; random states too."""
    seen = [*shape(directory, tick, background), torch.get_rng_state()]
    return xxhash.xxh3_128_hexdigest(b"".join(tensor.detach().numpy().tobytes() for tensor in seen))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each training ends with if nothing interrupts it."""
    return {name: digest(shape, tmp_path_factory.mktemp(name)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_killed_twice_it_ends_with_the_same_bits(
    tmp_path: Path, unbroken: dict[str, str], name: str, background: bool
) -> None:
    """Each shape of loop, saved in the loop and behind it."""
    for step in (5, 8):
        with pytest.raises(KilledError):
            digest(SHAPES[name], tmp_path, Kill(step), background=background)
    assert unbroken[name] == digest(SHAPES[name], tmp_path, background=background)


def die(step: int) -> Tick:
    """Return a tick that ends the process without the exit handlers of the interpreter."""
    return lambda now: os._exit(9) if now == step else None


@pytest.mark.slow
def test_a_dead_process_leaves_as_much(tmp_path: Path, unbroken: dict[str, str]) -> None:
    """What is carried from batch to batch was on the disk, whatever the process did not come to do."""
    assert 9 == subprocess.run([sys.executable, __file__, "recurrent", str(tmp_path), "6"], check=False).returncode
    with pytest.raises(KilledError):
        digest(SHAPES["recurrent"], tmp_path, Kill(9))
    assert unbroken["recurrent"] == digest(SHAPES["recurrent"], tmp_path)


# What a policy can do in a loop without epochs


def test_a_report_in_a_loop_without_epochs_is_saved(tmp_path: Path) -> None:
    """A due step that waits for its metric takes the next report's, be it in a while loop or over steps()."""
    policy = Policy(EverySteps(10), [KeepBest(1, "v", mode="min")])
    with Loop(tmp_path, policy, seen=0) as loop:
        while loop.progress.step < 35:
            loop.step({"loss": 1.0})
            if loop.progress.step in (12, 24, 34):
                loop.report({"v": 1 / loop.progress.step})
        assert (34, {"loss": 1.0, "v": 1 / 34}) == (loop.last.step, dict(loop.last.metrics))  # type: ignore[union-attr]


def steps_of(directory: Path, policy: Policy, count: int, metrics: dict[str, float]) -> None:
    """Take so many steps in a loop that has no epochs."""
    with Loop(directory, policy, seen=0) as loop:
        for _ in loop.steps(count):
            loop.step(metrics)


@pytest.mark.parametrize(("count", "said_at"), [(35, 35), (1001, 1000)])
def test_a_policy_that_saves_at_epochs_alone_is_said_in_a_loop_without_them(
    tmp_path: Path, count: int, said_at: int
) -> None:
    """After a thousand steps, or at the end."""
    policy = Policy(EveryEpochs(1), [KeepBest(1, "v", mode="min")])
    with pytest.warns(CheckpointerWarning, match=rf"^step {said_at}: no epoch has ended.*call loop.end_epoch\(\)"):
        steps_of(tmp_path, policy, count, {})


def test_a_metric_that_never_comes_is_said_in_a_loop_without_epochs(tmp_path: Path) -> None:
    """Nothing was saved, and the warning says for what it waits."""
    policy = Policy(EverySteps(10), [KeepBest(1, "v", mode="min")])
    with pytest.warns(CheckpointerWarning, match=r"^step 35: nothing is saved: .* waiting for v \(reported: loss\)"):
        steps_of(tmp_path, policy, 35, {"loss": 1.0})


def test_events_may_end_epochs(tmp_path: Path) -> None:
    """As an engine's handlers do: the epoch is counted, saved and gone on from."""
    policy = Policy(EveryEpochs(1), [KeepBest(1, "v", mode="min"), KeepLast(1)], last="link")
    with Loop(tmp_path, policy, seen=0) as loop:
        for epoch in range(2):
            for _ in range(3):
                loop.step()
            assert loop.end_epoch({"v": 1.0 - epoch})
        assert (6, 1, True) == (loop.last.step, loop.last.epoch, loop.last.epoch_end)  # type: ignore[union-attr]
    with Loop(tmp_path, policy, seen=0) as loop:
        assert (2, 6) == (loop.resume().epoch, loop.progress.step)
        epochs = loop.epochs(3)
        assert 2 == next(epochs)
        with pytest.raises(ObservationError, match=r"end_epoch\(\) within epochs\(\)"):
            loop.end_epoch()


def test_an_epoch_without_a_step_is_a_step(tmp_path: Path) -> None:
    """Else all epochs would have the same step, and only the first one would be saved; each has its own metrics."""
    with Loop(tmp_path, Policy(EveryEpochs(1), [KeepBest(3, "v", mode="min"), KeepLast(1)]), seen=0) as loop:
        for epoch in loop.epochs(3):
            loop.report({"v": 1.0 - epoch})
            loop.report({"w": 0.0})
        loop.end_epoch()
        seen = [(record.step, dict(record.metrics)) for record in loop.manager.records]
    assert [(step, {"v": 2.0 - step, "w": 0.0}) for step in (1, 2, 3)] + [(4, {})] == seen


def test_a_loop_that_is_left_within_a_step_says_that_it_is_not_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its state may be half a step further; left after step() it is saved."""
    for where in ("within", "after"):
        with Loop(tmp_path / where, Policy(EverySteps(10), [KeepLast(1)]), seen=0) as loop:
            for step in loop.steps():
                if step == 3 and where == "within":
                    break
                loop.step()
                if step == 2 and where == "after":
                    break
    assert "left within step 4, so that the state after step 3 is not saved" in caplog.text
    assert 3 == Loop(tmp_path / "after", STEPS, seen=0).last.step  # type: ignore[union-attr]


def test_a_body_of_steps_without_a_step_is_a_step(tmp_path: Path) -> None:
    """It does not go on for ever, and a report before its step is refused."""
    with Loop(tmp_path, Policy(EverySteps(2), [KeepLast(1)]), seen=0) as loop:
        assert [0, 1, 2] == list(loop.steps(3))
        assert 3 == loop.progress.step
        steps = loop.steps(4)
        assert 3 == next(steps)
        with pytest.raises(ObservationError, match=r"call step\(\) first"):
            loop.report({"v": 1.0})


def test_a_report_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    """Within an epoch whose batches the loop does not give it cannot know whether the epoch is over."""
    with Loop(tmp_path, Policy(EverySteps(1), [KeepBest(1, "v", mode="min")]), seen=0) as loop:
        for _ in loop.epochs(1):
            loop.step()
            loop.report({"v": 1.0})
            with pytest.warns(CheckpointerWarning, match="a report in epoch 0 was followed by another step"):
                loop.step()
            loop.report({"v": 2.0})
        assert 2.0 == loop.last.metrics["v"]  # type: ignore[union-attr]


def test_batches_are_numbered_from_where_the_epoch_was_left_off(tmp_path: Path) -> None:
    """Enumerating starts at the batches that are used."""
    policy = Policy(EverySteps(1), [KeepLast(1)])

    def numbers(stop: int) -> list[tuple[int, int]]:
        seen = []
        with Loop(tmp_path, policy, seen=0) as loop:
            loop.resume()
            for _ in loop.epochs(1):
                for number, batch in enumerate(loop.batches(range(100, 106)), start=loop.progress.batch):
                    seen.append((number, batch))
                    loop.step()
                    if number == stop:
                        return seen
        return seen

    assert [(0, 100), (1, 101), (2, 102)] == numbers(2)
    assert [(3, 103), (4, 104), (5, 105)] == numbers(9)


if __name__ == "__main__":
    SHAPES[sys.argv[1]](Path(sys.argv[2]), die(int(sys.argv[3])), False)
