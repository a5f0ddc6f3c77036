"""Calls of the public API as Triton launches them on a GPU, down to a driver that does nothing.

``python tests/triton_launch.py FOLDER``, where FOLDER holds `no_driver.c` as libcuda.so.1, prints a line of
JSON for each call: its kernels in order; then how many variants of each kernel there are after one call, and
after the same calls with sequences of 100 to 399 tokens. Tensors are on the CPU. A process of its own:
kernels made for the interpreter can't be launched.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterable
from typing import Any

import problems
from triton_compile import TARGETS, sample

import pama_kernels as pk
from pama_kernels.backends import triton as backend
from pama_kernels.backends.triton.apply import tokens_kernel
from pama_kernels.backends.triton.rows import row_sums_kernel, rows_kernel
from pama_kernels.backends.triton.rules import solve_kernel
from pama_kernels.backends.triton.statistics import count_kernel


def install(folder: str) -> Any:
    """Makes it Triton's driver; returns the library."""
    library = ctypes.CDLL(f"{folder}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    library.taken.restype = ctypes.c_char_p
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime.driver import driver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> Any:
            return TARGETS["sm_90"]

    driver.set_active(Driver())
    return library


KERNELS = (tokens_kernel, count_kernel, row_sums_kernel, rows_kernel, solve_kernel)


def variants(layout: str, rule: Any, widths: Iterable[int]) -> dict[str, int]:
    """How many of each kernel are compiled by now, after calls with sequences of these lengths."""
    for width in widths:
        p = problems.make(layout, rows=8, width=width, objectives=4)
        pk.pama_loss(**p.loss_arguments(), rule=rule)
        pk.combine_advantages(**p.combine_arguments(False), rule=rule)
    return {kernel.fn.__name__: len(kernel.device_caches[0][0]) for kernel in KERNELS}


def main() -> None:
    library = install(sys.argv[1])
    backend.unusable = lambda device_type: None
    for name, _, call in sample():
        call()
        print(json.dumps({"call": name, "kernels": library.taken().decode().split()}), flush=True)
    for layout in ("padded", "per-sequence"):
        for rule in (pk.Pama(), pk.Pama.paper("token")):
            first = variants(layout, rule, (100,))
            later = variants(layout, rule, (*range(101, 113), 127, 128, 129, 255, 256, 257, 384, 399))
            line = {"call": f"{layout} {rule}", "first": first, "later": later}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
