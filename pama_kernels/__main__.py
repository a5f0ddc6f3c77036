"""``python -m pama_kernels``: shows what is installed, analyses rewards before a training run, and plots a
training run."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

PROGRAM = "python -m pama_kernels"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Look before and while you train.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_info, _add_inspect, _add_plot):
        add(commands)
    asked = parser.parse_args(arguments)
    try:
        return int(asked.run(asked))
    except (OSError, ValueError, ImportError) as error:
        print(f"{PROGRAM} {asked.command}: error: {error}", file=sys.stderr)
        return 2


Commands = argparse._SubParsersAction  # argparse has no public name for it


def _add_info(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "what is installed, which backends work on this machine, and why the others do not"
    parser = commands.add_parser("info", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=_info)


def _info(asked: argparse.Namespace) -> int:
    from .tools import info

    print(info.text(as_json=asked.json))
    return 0


def _add_inspect(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "several rewards before a training: which teach, which disagree, what each rule makes of them"
    parser = commands.add_parser(
        "inspect",
        help=text,
        description=text,
        epilog="An empty cell or NaN means that the reward does not apply to the completion.",
    )
    parser.add_argument(
        "file",
        type=Path,
        help="CSV, JSONL or Parquet with a row for each completion; or a folder of such files, as TRL's "
        "log_completions writes them",
    )
    parser.add_argument(
        "--rewards", nargs="+", metavar="COLUMN", help="default: all numeric ones but counters and ids"
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="completions of one prompt, which stand together"
    )
    parser.add_argument(
        "--group-column",
        metavar="COLUMN",
        help="instead, what tells prompts apart; default: prompt or the like",
    )
    parser.add_argument(
        "--step-column", metavar="COLUMN", help="rules solve for each step by itself; default: step, if there"
    )
    parser.add_argument(
        "--preference", nargs="+", type=float, metavar="P", help="one number for each reward; default: equal"
    )
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="also draw it: .png, .svg or .pdf")
    parser.set_defaults(run=_inspect)


def _inspect(asked: argparse.Namespace) -> int:
    from .tools.inspect import inspect_rewards
    from .tools.pictures import check_picture, draw_inspection
    from .tools.read import read_table
    from .tools.report import format_inspection

    if asked.plot is not None:
        check_picture(asked.plot)
    found = inspect_rewards(
        read_table(asked.file),
        rewards=asked.rewards,
        group_size=asked.group_size,
        group_column=asked.group_column,
        step_column=asked.step_column,
        preference=asked.preference,
    )
    print(format_inspection(found))
    if asked.plot is not None:
        draw_inspection(found, asked.plot)
        print(f"\nwrote {asked.plot}")
    return 0


def _add_plot(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "a training: rewards, weights, covariances and conflicts in one picture"
    parser = commands.add_parser("plot", help=text, description=text)
    parser.add_argument(
        "run_path",
        type=Path,
        metavar="RUN",
        help="TRL's output or checkpoint folder or trainer_state.json; a TensorBoard folder; the folder with "
        "Stable-Baselines3's progress.csv",
    )
    parser.add_argument("--out", type=Path, default=Path("pama.png"), help="default: %(default)s")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="draw again whenever the run has grown, looking every %(const)s seconds; end with Ctrl-C",
    )
    parser.set_defaults(run=_plot)


def _plot(asked: argparse.Namespace) -> int:
    from .tools.pictures import check_picture
    from .tools.plot import draw_run, watch
    from .tools.runs import read_run

    check_picture(asked.out)
    if asked.watch is None:
        draw_run(read_run(asked.run_path), asked.out)
        print(f"wrote {asked.out}")
        return 0
    if not asked.watch > 0:
        raise ValueError(f"watch: expected seconds above 0, got {asked.watch}")
    with contextlib.suppress(KeyboardInterrupt):
        watch(asked.run_path, asked.out, asked.watch, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
