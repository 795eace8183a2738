"""Read a policy from a YAML file. A mistake in the file is an error before the training starts."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpointer import CheckpointManager, Policy
from checkpointer.errors import PolicyError

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", type=Path, default=HERE / "thrifty.yaml")
    args = parser.parse_args(argv)
    policy = Policy.from_yaml(args.policy)
    print(policy)

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "run")
        with CheckpointManager(directory, policy, state=lambda: {"w": 1}) as manager:
            for epoch, val_loss in enumerate([0.9, 0.4, 0.6, 0.5, 0.7]):
                print(manager.observe({"val_loss": val_loss}, step=10 * (epoch + 1), epoch=epoch))
        print("kept:", *sorted(path.name for path in directory.iterdir() if path.suffix == ".ckpt"))

        wrong = Path(folder, "wrong.yaml")
        wrong.write_text(args.policy.read_text().replace("KeepBest", "KeepBset"))
        try:
            Policy.from_yaml(wrong)
        except PolicyError as error:
            print("error for a typo:", error)


if __name__ == "__main__":
    main()
