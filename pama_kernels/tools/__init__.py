"""The commands of ``python -m pama_kernels``: `info`, `inspect`, `plot`."""
