"""One manager for several processes: rank 0 leads, the other ranks take part."""
