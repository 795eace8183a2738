"""The parts of ``benchmarks/performance.py``: sides that take turns, peers, builds, and a module for each measure."""
