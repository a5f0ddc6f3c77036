"""Counts the instructions of the compiled CPU kernels: `python benchmarks/cpu_code.py [MODULE]`.

For the main loop of each float32 kernel in MODULE (the built `_cpu`) and each instruction set: tokens per
iteration, instructions, those that access memory, and cycles according to llvm-mca with all data in the
first-level cache. The counts do not depend on other processes. Needs objdump; without
llvm-mca there are no cycles. Prints a table and writes it to cpu_code.csv.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
COLUMNS = ("kernel", "isa", "tokens", "instructions", "memory", "cycles", "bound by")
WIDTHS = {"avx512": 16, "avx2": 8}
MODELS = {"avx512": "icelake-server", "avx2": "icelake-server"}  # of llvm-mca
# What a loop does, the function that holds it (the longest one, where several match), and which of its
# innermost loops it is: the one with the most arithmetic or the most permutations, the shortest one that
# multiplies, or the whole function where it has no loop.
KERNELS = (
    (
        "per sequence: sums, ratios kept",
        r"bool \S+::plain_chunk<false, .*?\)2, \S+Native<float>, false",
        "most",
    ),
    (
        "per sequence: sums and gradient",
        r"bool \S+::plain_chunk<false, .*?\)1, \S+Native<float>, false",
        "most",
    ),
    (
        "per sequence: gradient from ratios",
        r"void \S+::kept_gradient<false, \S+Native<float>, false",
        "shortest",
    ),
    (
        "per token, known weights, N=8: loss and gradient",
        r"double \S+::direct_chunk<false, 8, \S+Native",
        "most",
    ),
    ("per token, known weights, N=8, bfloat16", r"double \S+::direct_chunk<false, 8, \S+Bfloat16", "most"),
    ("per token: factors of the clipped ratio", r"bool \S+::store_plain_factors<false, \S+Native", "most"),
    (
        "per token, N=8: objectives transposed",
        r"void \S+::rows_to_columns<8, \S+Native.*load_objectives",
        "permutes",
    ),
    (
        "per token, N=8: objectives transposed, bfloat16",
        r"void \S+::rows_to_columns<8, \S+Bfloat16.*load_objectives",
        "permutes",
    ),
    (
        "per token: statistics of 2 objectives (AVX2: 1), signed",
        r"void \S+::plain_sums<false, true, (2, float __vector\(16\)|1, float __vector\(8\))",
        "most",
    ),
    (
        "per token: statistics of 2 objectives (AVX2: 1), Noon",
        r"void \S+::plain_sums<true, true, (2, float __vector\(16\)|1, float __vector\(8\))",
        "most",
    ),
    (
        "per token: statistics of 4 objectives (AVX2: 2) where bound terms are advantages",
        r"void \S+::unclipped_sums<(4, float __vector\(16\)|2, float __vector\(8\))",
        "most",
    ),
    (
        "per token: products between 4 objectives and 4 (AVX2: 2)",
        r"void \S+::product_block<true, float",
        "most",
    ),
    (
        "per token: products within 2 groups of 4 objectives (AVX2: 1)",
        r"void \S+::own_products<true, (2, float, float __vector\(16\)|1, float, float __vector\(8\))",
        "most",
    ),
    (
        "weights per token, N=8, regularization > 0",
        r".*::(sorted_weights|simplex_sorted)<float __vector\(\d+\), 8>",
        "whole",
    ),
    (
        "the same, with bound terms and combination (Noon)",
        r"void \S+::regularized_scores<8, ",
        "most",
    ),
)
ARITHMETIC = re.compile(r"vf?n?m?(?:add|sub|mul|madd|msub|nmadd|min|max)\w*ps")
PERMUTES = re.compile(r"v(?:perm|shuf|unpck)")
JUMP = re.compile(r"j(?!mp)\w+\s+([0-9a-f]+)")  # a loop ends with a condition


class Instruction(NamedTuple):
    address: int
    text: str


def functions(file: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Demangled name and code of each function in a file."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as printing:
        assert printing.stdout is not None
        name, code = "", list[Instruction]()
        for line in printing.stdout:
            header = re.match(r"[0-9a-f]+ <(.*)>:$", line)
            found = re.match(r"\s+([0-9a-f]+):\s+(.*\S)", line)
            if header:
                name, code = header[1], []
            elif found:
                code.append(Instruction(int(found[1], 16), found[2].split("#")[0].strip()))
            elif code:
                yield name, code
                name, code = "", []
        if code:
            yield name, code


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    jumps = [(x.address, int(m[1], 16)) for x in code if (m := JUMP.match(x.text))]
    back = [(to, at) for at, to in jumps if code[0].address <= to < at]
    inner = [a for a in back if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in back)]
    return [[x for x in code if first <= x.address <= last] for first, last in inner]


def main_loop(code: list[Instruction], which: str) -> list[Instruction]:
    def arithmetic(loop: list[Instruction]) -> int:
        return sum(ARITHMETIC.match(x.text) is not None for x in loop)

    if which == "whole":
        return code
    loops = [x for x in innermost_loops(code) if len(x) < 400]
    if which == "permutes":
        return max(loops, key=lambda loop: sum(PERMUTES.match(x.text) is not None for x in loop))
    if which == "shortest":
        multiplies = [x for x in loops if any(i.text.startswith("vmulps") for i in x)]
        return min(multiplies, key=len)
    return max(loops, key=arithmetic)


def cycles(loop: list[Instruction], model: str) -> tuple[float | None, str]:
    """Cycles of one turn, and what limits it, by llvm-mca."""
    tool = shutil.which("llvm-mca")
    if tool is None:
        return None, ""
    lines = (re.sub(r"^(j\w+|call)\s.*", r"\1 0", x.text) for x in loop if not x.text.startswith("nop"))
    text = "\n".join(x for x in lines if not x.startswith(("ret", "call")))
    command = [tool, f"-mcpu={model}", "-iterations=100", "-bottleneck-analysis"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Total Cycles:\s+(\d+)", done)
    assert found is not None
    reason = re.search(r"\[\s*([\d.]+)%\s*\]\s*\n", done)
    ports = re.findall(r"- (\w+)\s+\[ ([\d.]+)% \]", done)
    if not reason or not ports:
        return int(found[1]) / 100, ""
    name, _ = max(ports, key=lambda x: float(x[1]))
    return int(found[1]) / 100, name


def rows(file: str) -> Iterator[dict[str, Any]]:
    for name, code in functions(file):
        isa = next((x for x in WIDTHS if f"pama::{x}::" in name), None)
        for kernel, pattern, which in KERNELS:
            if isa is None or not re.match(pattern, name):
                continue
            loop = main_loop(code, which)
            counted = [x for x in loop if not x.text.startswith("nop")]
            memory = sum("(" in x.text and not x.text.startswith(("lea", "prefetch")) for x in counted)
            took, reason = cycles(counted, MODELS[isa])
            row = {"kernel": kernel, "isa": isa, "tokens": WIDTHS[isa], "instructions": len(counted)}
            yield {**row, "memory": memory, "cycles": took, "bound by": reason}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", nargs="?", help="default: the installed pama_kernels.backends._cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "local", help="folder of the CSV")
    arguments = parser.parse_args()
    file = arguments.module
    if file is None:
        found = importlib.util.find_spec("pama_kernels.backends._cpu")
        if found is None or found.origin is None:
            parser.error("MODULE: expected a path where pama_kernels.backends._cpu is not built, got none")
        file = found.origin
    order = [kernel for kernel, *_ in KERNELS]
    longest = {(x["isa"], x["kernel"]): x for x in sorted(rows(file), key=lambda x: int(x["instructions"]))}
    table = sorted(longest.values(), key=lambda x: (list(WIDTHS).index(x["isa"]), order.index(x["kernel"])))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "cpu_code.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        print(" ".join(f"{row.get(key, '')!s:>{14 if key != 'kernel' else 52}}" for key in COLUMNS))


if __name__ == "__main__":
    main()
