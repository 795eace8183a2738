"""The functions beneath the commands: look at directories, verify, clean up, copy, compare, simulate."""
