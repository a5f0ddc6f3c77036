"""`sanitized.py` with a protected page beside every tensor: an access out of bounds ends the process.

For backends that run on the CPU, Triton's kernels in the interpreter among them. `guarded.py before` puts
the page before each tensor, `after` behind it. What compute-sanitizer finds on a GPU, without one.
"""

from __future__ import annotations

import ctypes
import mmap
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[Any] = []  # as long as the process runs
_empty, _before = torch.empty, sys.argv[1:2] == ["before"]


def guarded(count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements filled with NaN, beside a protected page."""
    size = max(count, 1) * dtype.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    closed = address if _before else address + pages * PAGE
    memory[:] = b"\xff" * len(memory)
    if _libc.mprotect(ctypes.c_void_p(closed), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE if _before else pages * PAGE - size
    _kept.append(memory)
    return torch.frombuffer(memory, dtype=dtype, count=max(count, 1), offset=offset)[:count]


def empty(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    if options.get("device") not in (None, "cpu", torch.device("cpu")) or torch.is_grad_enabled() is None:
        return _empty(*size, dtype=dtype, **options)
    dtype = dtype or torch.get_default_dtype()
    return guarded(torch.Size(shape).numel(), dtype).view(torch.Size(shape))


def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return empty(*size, dtype=dtype or self.dtype)


def copied(x: Tensor) -> Tensor:
    return guarded(x.numel(), x.dtype).view(x.shape).copy_(x.detach())


def main() -> None:
    torch.empty = empty
    torch.empty_like = lambda x, dtype=None, **_: empty(x.shape, dtype=dtype or x.dtype)
    Tensor.new_empty = new_empty  # type: ignore[method-assign, assignment]
    sys.argv = sys.argv[:1]
    runpy.run_path(
        str(Path(__file__).with_name("sanitized.py")), init_globals={"copied": copied}, run_name="guarded"
    )


if __name__ == "__main__":
    main()
