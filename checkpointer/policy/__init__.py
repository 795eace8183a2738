"""When to save, what to keep, and how to name it. Pure: no torch, no files, no clock."""
