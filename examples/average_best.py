"""Average the weights of the best three checkpoints of the digits, and compare the mean with the best checkpoint.

If the directory is empty, it trains first. The mean is computed one tensor at a time, to save memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from checkpointer_torch import load_weights
from digits_loop import POLICY, load_splits, make_net, measure
from digits_loop import main as train

from checkpointer import CheckpointManager
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.storage import open_storage
from checkpointer.tools.average import average, weights_of


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs/digits"))
    args = parser.parse_args(argv)
    train(["--directory", str(args.directory), "--quiet"])
    test = load_splits()["test"]

    with CheckpointManager(args.directory, POLICY) as manager:
        best = manager.policy.top(manager.session.manifest.history)
    net, storage = make_net(), open_storage(args.directory, "")
    with ExitStack() as stack:
        payloads = [(record.name, stack.enter_context(open_contents(storage, record.name))) for record in best]
        mean = average([(name, weights_of(payload)) for name, payload in payloads])
        net.load_state_dict({name: mean.read(name) for name in mean.tensors})
    averaged_loss, averaged = measure(net, *test)
    load_weights(net, args.directory / best[0].name)
    alone_loss, alone = measure(net, *test)
    print(f"the best alone, {best[0].name}: test loss {alone_loss:.4f}, {alone:.1%} right")
    print(f"the mean of the best {len(best)}: test loss {averaged_loss:.4f}, {averaged:.1%} right")


if __name__ == "__main__":
    main()
