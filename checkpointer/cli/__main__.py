"""``python -m checkpointer.cli``: the same command, where the environment's scripts are not on the path."""

from checkpointer.cli import main

main()
