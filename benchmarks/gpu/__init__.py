"""The parts of ``benchmarks/on_gpu.py``: one module for each of its sections."""
