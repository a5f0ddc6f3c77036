"""Calls of the public API as Triton launches them on a GPU, down to a driver that does nothing.

``python tests/triton_launch.py FOLDER``, where FOLDER holds `no_driver.c` as libcuda.so.1, prints a line of
JSON for each call: its kernels in order. Tensors are on the CPU. A process of its own: kernels made for the
interpreter can't be launched.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

from triton_compile import TARGETS, sample

from pama_kernels.backends import triton as backend


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


def main() -> None:
    library = install(sys.argv[1])
    backend.unusable = lambda device_type: None
    for name, _, call in sample():
        call()
        print(json.dumps({"call": name, "kernels": library.taken().decode().split()}), flush=True)


if __name__ == "__main__":
    main()
