"""What the commands do: look at directories, verify, clean up, copy, compare, simulate."""
