"""``python -m checkpointer``: the command line, where the environment's scripts are not on the path."""

from checkpointer.cli import main

main()
