"""Counts instructions of the compiled GPU kernels, without a GPU: `python benchmarks/gpu_code.py [MODULE]`.

For the CUDA kernels in MODULE (the built `_cuda`, or a .cubin): registers, and for the main loop instructions
per token and accesses to local memory. For the Triton kernels, compiled ahead of time: registers,
instructions, barriers, seconds of compilation. Prints a table and writes it to gpu_code.csv.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
COLUMNS = ("kernel", "architecture", "registers", "local", "instructions", "per token", "barriers", "seconds")
# Tokens that a thread takes in one turn of the main loop.
TOKENS = {"flat_kernel": 4, "row_sums_kernel": 4, "tokens_kernel": 1}
FLAT = re.compile(r"flat_kernelILi(\d)ELb([01])ELb([01])E")
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\b(BRA|EXIT|RET|BRX|JMP)\b.*?(0x[0-9a-f]+)?\s*$")


class Instruction(NamedTuple):
    address: int
    text: str

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+ ", "", self.text).split()[0]

    def successors(self, following: int) -> list[int]:
        """Addresses that may come next; calls return."""
        found = BRANCH.search(self.text)
        if found is None or self.opcode.split(".")[0] not in ("BRA", "EXIT", "RET"):
            return [following]
        # A condition may also be an operand: `BRA P1, 0x10`.
        conditional = self.text.startswith("@") or re.search(r"BRA\S* !?U?[PR]", self.text) is not None
        target = [int(found[2], 16)] if found[2] else []
        return target + ([following] if conditional else [])


def cuobjdump() -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton

        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return tool


def functions(file: str) -> Iterator[tuple[str, str, list[Instruction]]]:
    """Architecture, mangled name and code of each kernel in a file."""
    printed = subprocess.run([cuobjdump(), "-sass", file], capture_output=True, text=True, check=True).stdout
    architecture, name = "", ""
    code: list[Instruction] = []
    for line in printed.splitlines():
        header = re.match(r"\s*(?:code for (\S+)|Function : (\S+))", line)
        if header:
            if code:
                yield architecture, name, code
                code = []
            architecture, name = header[1] or architecture, header[2] or name
        found = LINE.match(line)
        if found:
            code.append(Instruction(int(found[1], 16), found[2].strip()))
    if code:
        yield architecture, name, code


def registers(file: str) -> dict[str, int]:
    command = [cuobjdump(), "--dump-resource-usage", file]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"Function (\S+?):\s+REG:(\d+)", printed)}


def shortest(code: list[Instruction], head: int, last: int) -> list[Instruction]:
    """The path of fewest instructions from the head of a loop to its branch back: that of whole vectors."""
    at = {x.address: i for i, x in enumerate(code)}
    queue, before = [(0, at[head], -1)], {}
    while queue:
        length, i, origin = heapq.heappop(queue)
        if i in before:
            continue
        before[i] = origin
        if code[i].address == last:
            break
        following = code[i + 1].address if i + 1 < len(code) else -1
        for address in code[i].successors(following):
            if head <= address <= last and address in at:
                heapq.heappush(queue, (length + 1, at[address], i))
    path, i = [], at[last]
    while i >= 0 and i in before:
        path.append(code[i])
        i = before[i]
    return path


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most float32 arithmetic, along its shortest path."""
    arithmetic = [x.address for x in code if x.opcode.startswith(("FFMA", "FADD", "FMUL"))]
    loops = []
    for x in code:
        for target in x.successors(-1):
            if 0 <= target < x.address and x.opcode == "BRA":
                inside = sum(target <= a <= x.address for a in arithmetic)
                loops.append((inside / (x.address - target), inside, target, x.address))
    loops = [loop for loop in loops if loop[1] >= 16]
    if not loops:
        return []
    _, _, head, last = max(loops)
    return shortest(code, head, last)


def title(name: str) -> str | None:
    """The name of a frequently used kernel in the table."""
    flat = FLAT.search(name)
    if flat:
        n, pairs, full = flat.groups()
        return f"flat_kernel N={n}{' pairs' if pairs == '1' else ''}" if full == "1" else None
    for kernel in TOKENS:
        if re.search(rf"\d{kernel}", name):
            kind = "double" if "Id" in name else "float"
            return f"{kernel} {kind}{' float32 tensors' if 'fLb1' in name else ''}"
    return None


def cuda(file: str) -> Iterator[dict[str, Any]]:
    used = registers(file)
    for architecture, name, code in functions(file):
        called = title(name)
        if called is None:
            continue
        loop = main_loop(code)
        local = sum(x.opcode.startswith(("LDL", "STL")) for x in loop)
        row = {"kernel": called, "architecture": architecture, "registers": used.get(name), "local": local}
        tokens = TOKENS[called.split()[0]]
        yield {**row, "instructions": len(code), "per token": round(len(loop) / tokens, 1) if loop else ""}


def triton(target: str) -> Iterator[dict[str, Any]]:
    script = str(ROOT / "tests" / "backends" / "triton_variants.py")
    with tempfile.TemporaryDirectory() as folder:  # nothing is compiled already
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        command = [sys.executable, script, "compile", target]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for line in map(json.loads, done.stdout.splitlines()):
        row = {"kernel": f"triton {line['kernel']}: {line['call']}", "architecture": target}
        row |= {key: line.get(key) for key in ("registers", "instructions", "barriers", "seconds")}
        yield {**row, "local": line["spills"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", nargs="?", help="default: the installed pama_kernels.backends._cuda")
    parser.add_argument("--no-triton", action="store_true", help="CUDA C++ only")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "local", help="folder of the CSV")
    arguments = parser.parse_args()
    file = arguments.module
    if file is None:
        found = importlib.util.find_spec("pama_kernels.backends._cuda")
        file = found.origin if found else None
    rows = list(cuda(file)) if file else []
    rows += [] if arguments.no_triton else triton("sm_90")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "gpu_code.csv").open("w", newline="") as out:
        table = csv.DictWriter(out, COLUMNS, restval="")
        table.writeheader()
        table.writerows(rows)
    for row in rows:
        print(" ".join(f"{row.get(key, '')!s:>{12 if key != 'kernel' else 60}}" for key in COLUMNS))


if __name__ == "__main__":
    main()
