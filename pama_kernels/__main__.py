"""``python -m pama_kernels``: shows what is installed, analyses rewards before a training run, and plots a
training run."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

PROGRAM = "python -m pama_kernels"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of the output has ended, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, ImportError) as error:
        print(f"{PROGRAM} {options.command}: error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=PROGRAM, description="Analyse rewards before and during training.")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_info, _add_inspect, _add_plot):
        add(commands)
    return made


Commands = argparse._SubParsersAction  # argparse has no public name for it


def _add_info(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "what is installed, which backends work on this machine, and why the others do not"
    parser = commands.add_parser("info", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    from .tools import info

    print(info.text(as_json=options.json))
    return 0


def _add_inspect(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "several rewards before training: which vary, which conflict, and the effect of each rule"
    parser = commands.add_parser(
        "inspect",
        help=text,
        description=text,
        epilog="An empty cell or NaN means that the reward does not apply to the completion.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="CSV, JSONL or Parquet with a row for each completion; or a folder of such files, as TRL's "
        "log_completions writes them",
    )
    parser.add_argument(
        "--rewards", nargs="+", metavar="COLUMN", help="default: all numeric columns but counters and ids"
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="completions per prompt, in adjacent rows"
    )
    parser.add_argument(
        "--group-column",
        metavar="COLUMN",
        help="instead of --group-size, the column that identifies the prompt; default: one called prompt, "
        "prompt_id, group, uid, input ...",
    )
    parser.add_argument(
        "--step-column",
        metavar="COLUMN",
        help="solve the rules for each step separately; default: step or global_step, if there is one",
    )
    parser.add_argument(
        "--preference", nargs="+", type=float, metavar="P", help="one number for each reward; default: equal"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PICTURE", help="also draw the result: .png, .svg or .pdf"
    )
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from .tools.inspect import inspect_rewards
    from .tools.pictures import check_picture, draw_inspection
    from .tools.read import read_table
    from .tools.report import format_inspection

    if options.plot is not None:
        check_picture(options.plot)
    found = inspect_rewards(
        read_table(options.file),
        rewards=options.rewards,
        group_size=options.group_size,
        group_column=options.group_column,
        step_column=options.step_column,
        preference=options.preference,
    )
    print(format_inspection(found))
    if options.plot is not None:
        draw_inspection(found, options.plot)
        print(f"\nwrote {options.plot}")
    return 0


def _add_plot(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "a training run in one picture: rewards, weights, covariances and conflicts"
    parser = commands.add_parser("plot", help=text, description=text)
    parser.add_argument(
        "run_path",
        type=Path,
        metavar="RUN",
        help="TRL's output or checkpoint folder or trainer_state.json; a TensorBoard folder; the folder with "
        "Stable-Baselines3's progress.csv",
    )
    parser.add_argument(
        "--out",
        metavar="PICTURE",
        type=Path,
        default=Path("pama.png"),
        help="the picture: .png, .svg or .pdf; default: %(default)s",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="check for new data every %(const)g seconds and draw again; end with Ctrl-C",
    )
    parser.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> int:
    from .tools.pictures import check_picture
    from .tools.plot import draw_run, watch
    from .tools.runs import read_run

    check_picture(options.out)
    if options.watch is None:
        draw_run(read_run(options.run_path), options.out)
        print(f"wrote {options.out}")
        return 0
    if not options.watch > 0:
        raise ValueError(f"watch: expected seconds above 0, got {options.watch}")
    with contextlib.suppress(KeyboardInterrupt):
        watch(options.run_path, options.out, options.watch, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
