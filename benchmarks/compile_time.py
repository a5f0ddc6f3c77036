"""What a first call waits for Triton's compiler, without a GPU: `python -m benchmarks.compile_time`.

Prints the CPU seconds of each stage for each kernel of a first `combine_advantages` and `pama_loss` with its
gradient, (B, N), compiled one after the other for sm_90. Then the wall time of these calls, and of
`compile_kernels`, on a machine with a core for each kernel: in a process of its own the front end runs, and
every other stage waits as long as it took before. The kernels of each process are new.
"""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
STAGES = ("front end", "ttir", "ttgir", "llir", "ptx", "cubin", "launcher")
Taken = dict[
    tuple[str, str], tuple[float, dict[str, Any], Any]
]  # by hash and stage: seconds, metadata, result


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in used)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = cpu_seconds()
    result = function()
    return cpu_seconds() - start, result


def watch_stages(taken: Taken, replay: bool) -> None:
    """Records the stages after the front end, or waits in their place."""
    from triton.backends.nvidia.compiler import CUDABackend

    add = CUDABackend.add_stages

    def watched(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def run(source: Any, metadata: dict[str, Any]) -> Any:
            key = metadata["hash"], name
            if replay:
                seconds, changed, result = taken[key]
                time.sleep(seconds)
                metadata.update(changed)
                return result
            before = dict(metadata)
            seconds, result = timed(lambda: stage(source, metadata))
            changed = {k: x for k, x in metadata.items() if k not in before or before[k] != x}
            taken[key] = seconds, changed, result if isinstance(result, bytes) else str(result)
            return result

        return run

    def add_stages(self: Any, stages: dict[str, Any], *rest: Any) -> None:
        add(self, stages, *rest)
        stages.update({name: watched(name, stage) for name, stage in stages.items()})

    CUDABackend.add_stages = add_stages


def watch_launchers(taken: Taken, replay: bool) -> None:
    """The same for the launchers that Triton 3.6 has the C compiler build; a second one waits for the
    first."""
    from triton.backends.nvidia import driver

    build = getattr(driver, "compile_module_from_src", None)
    begun: dict[tuple[str, str], float] = {}

    def watched(src: str, name: str, **options: Any) -> Any:
        if name != "__triton_launcher":
            return build(src=src, name=name, **options)
        key = src, "launcher"
        if replay:
            ready = begun.setdefault(key, time.perf_counter() + taken[key][0])
            time.sleep(max(0.0, ready - time.perf_counter()))
            return SimpleNamespace(launch=lambda *_: None)
        seconds, module = timed(lambda: build(src=src, name=name, **options))
        taken[key] = seconds, {}, None
        return module

    if build is not None:
        driver.compile_module_from_src = watched


def calls(objectives: int) -> dict[str, Callable[[], Any]]:
    import torch

    import pama_kernels as pk

    rows, width = 32, 700
    logprobs, mask = torch.zeros(rows, width), torch.ones(rows, width, dtype=torch.bool)
    advantages = torch.randn(rows, objectives)

    def loss() -> None:
        pk.pama_loss(logprobs.clone().requires_grad_(), logprobs, advantages, mask).loss.backward()

    return {"combine_advantages": lambda: pk.combine_advantages(advantages, mask), "pama_loss": loss}


def record(objectives: int, file: Path) -> None:
    from pama_kernels.backends.triton import launch

    taken: Taken = {}
    watch_stages(taken, False)
    watch_launchers(taken, False)
    print(" ".join(f"{name:>9}" for name in STAGES), "kernel")
    known = set()
    for name, call in calls(objectives).items():
        launches: list[Any] = []
        with launch.watching(lambda kernel, _, *rest, to=launches: to.append((kernel, *rest))):
            call()
        for kernel, arguments, options in launches:
            key, _ = launch.key_of(kernel, arguments, options)
            if key in known:
                continue
            known.add(key)
            like = kernel, arguments, launch.is_even(arguments, options), options
            whole, made = timed(lambda like=like: launch.compiled(*like))
            own = [taken[made.hash, stage][0] for stage in STAGES[1:-1]]
            loading, _ = timed(lambda made=made: made.run)
            seconds = (whole - sum(own), *own, loading)
            print(" ".join(f"{x:9.2f}" for x in seconds), f"{kernel.fn.__name__}: {name}", flush=True)
    file.write_bytes(pickle.dumps(taken))


def replay(objectives: int, file: Path, ahead: bool) -> None:
    import pama_kernels as pk

    taken = pickle.loads(file.read_bytes())  # of this script's own
    watch_stages(taken, True)
    watch_launchers(taken, True)
    os.cpu_count = lambda: 64  # of `compile_launches`
    if ahead:
        print(pk.compile_kernels(objectives, slices=False, device="cpu").seconds)
        return
    waited = 0.0
    for call in calls(objectives).values():
        start = time.perf_counter()
        call()
        waited += time.perf_counter() - start
    print(waited)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objectives", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3, help="processes; the fastest counts")
    parser.add_argument("--what", choices=("record", "calls", "ahead"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what is not None:
        sys.path.insert(0, str(ROOT / "tests" / "backends"))
        from null_driver import NullDriver

        NullDriver()
        if arguments.what == "record":
            record(arguments.objectives, arguments.file)
        else:
            replay(arguments.objectives, arguments.file, arguments.what == "ahead")
        return
    with tempfile.TemporaryDirectory() as folder:

        def run(what: str) -> str:
            own = ["--objectives", str(arguments.objectives), "--file", f"{folder}/stages", "--what", what]
            with tempfile.TemporaryDirectory() as cache:
                environment = {**os.environ, "TRITON_CACHE_DIR": cache}
                command = [sys.executable, "-m", "benchmarks.compile_time", *own]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            return done.stdout

        print(run("record"))
        for what, title in (("calls", "both calls"), ("ahead", "compile_kernels")):
            waited = min(float(run(what)) for _ in range(arguments.repeat))
            print(f"{title}, a core for each kernel: {waited:.2f} s")


if __name__ == "__main__":
    main()
