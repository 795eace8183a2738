"""A training that goes on bit by bit as if it had not been interrupted: ``python -m gpu.resuming DEVICE FOLDER STEPS``.

The algorithms are deterministic; dropout, mixed precision, its scaler and a fused optimizer take part.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Before the first use of the device.

import torch
import xxhash
from checkpointer_torch import Loop

from checkpointer import EverySteps, KeepLast, Policy
from gpu.device import Run

WHOLE, PART = 12, 7
"""Steps of the whole training, and of its first part."""
POLICY = Policy(EverySteps(5), [KeepLast(1)], last="link")


def checked(run: Run) -> list[tuple[str, ...]]:
    """Compare a training with one that a second process goes on with.

    Raises:
        AssertionError: If one bit differs.
    """
    _, unbroken = train(run.device, f"{run.folder}/unbroken", WHOLE)
    train(run.device, f"{run.folder}/broken", PART)
    command = [sys.executable, "-W", "ignore", "-m", "gpu.resuming", run.device, f"{run.folder}/broken", str(WHOLE)]
    went_on = subprocess.run(command, capture_output=True, text=True)
    assert went_on.returncode == 0, went_on.stderr
    assert went_on.stdout.split() == [str(PART), unbroken], (unbroken, went_on.stdout)
    return [("resume in a new process, deterministic algorithms", "torch-checkpointer", "each bit is equal", "")]


def train(device: str, where: str, steps: int) -> tuple[int, str]:
    """Train from the last checkpoint on; return where it began, and the digest of all that it then consists of."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(1)
    net, optimizer, scaler = _objects(device)
    with Loop(where, POLICY, options={"background": "wait"}, model=net, optimizer=optimizer, scaler=scaler) as loop:
        first = loop.resume().step
        for _ in loop.steps(steps):
            _learn(device, net, optimizer, scaler)
            loop.step()
    torch.use_deterministic_algorithms(False)
    return first, _digest(device, net, optimizer, scaler)


def _objects(device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    layers = (torch.nn.Linear(32, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Dropout(0.3))
    net = torch.nn.Sequential(*layers, torch.nn.Linear(64, 8)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    return net, optimizer, torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=3)


def _learn(device: str, net: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
        loss = net(torch.randn(16, 32, device=device)).float().square().mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def _digest(device: str, *objects: Any) -> str:
    content = io.BytesIO()
    torch.save([each.state_dict() for each in objects], content)
    random = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    return xxhash.xxh3_128_hexdigest(content.getvalue() + bytes(random.tolist()))


if __name__ == "__main__":
    print(*train(sys.argv[1], sys.argv[2], int(sys.argv[3])))
