"""Several processes of one gloo group, for tests with several ranks."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

SECONDS = 120  # for all processes of a world together; they need about 10
Work = Callable[[int, int], dict[str, Any]]  # (world, rank) -> what this rank found


def run(work: Work, world: int, directory: Path) -> list[dict[str, Any]]:
    """The results of all ranks. `work` is a function of a module, so that the processes can import it."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo backend")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_process, args=(work, world, rank, str(directory)), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.05)
    for process in processes:
        if process.exitcode is None and any(code for code in codes):
            process.join(2)  # the others wait for one that has failed
        if process.exitcode is None:
            process.kill()
        process.join()
    errors = "\n".join(path.read_text() for path in sorted(directory.glob("*.error")))
    assert [process.exitcode for process in processes] == [0] * world, errors or "out of time"
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _process(work: Work, world: int, rank: int, directory: str) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/rendezvous",
            world_size=world,
            rank=rank,
            timeout=timedelta(seconds=SECONDS),
        )
        torch.save(work(world, rank), f"{directory}/{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(directory, f"{rank}.error").write_text(traceback.format_exc())
        raise
