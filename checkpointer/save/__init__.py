"""From a decision to a committed checkpoint, in the loop or on the writer thread."""
