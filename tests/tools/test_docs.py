"""The Python code in README.md and docs/ runs as it is printed.

Each block runs separately, in a fresh namespace and an empty directory. A comment on the line before it may
change this:

    <!-- not run: why -->   is only compiled
    <!-- run by: file -->   is only compiled here: it needs what that test prepares
    <!-- needs: module -->  is skipped where the module is not installed
    <!-- recipe: name -->   defines `name`, which tests/tools/test_recipes.py calls (it is run here as well)
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(
    r"^(?:<!-- ([a-z ]+): ([^\n]+?) -->\n)?```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE
)
KINDS = ("not run", "run by", "needs", "recipe")


class Block(NamedTuple):
    page: Path
    line: int  # of the first statement
    kind: str | None
    value: str | None
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def compiled(self) -> object:
        """Blank lines in front, so that a traceback shows the line of the page."""
        return compile("\n" * (self.line - 1) + self.code, str(self.page), "exec")


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start(3)) + 1, *found.groups())
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def test_every_block_was_found() -> None:
    assert any(block.page.name == "README.md" for block in BLOCKS)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(blocks(page)) == len(re.findall(r"^[ \t]*```[ \t]*py", text, flags=re.MULTILINE)), page
    assert {block.kind for block in BLOCKS} <= {None, *KINDS}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = block.compiled()
    if block.kind == "run by":
        assert block.page.name in (ROOT / block.value).read_text(encoding="utf-8")
    if block.kind in ("not run", "run by"):
        return
    if block.kind == "needs" and importlib.util.find_spec(block.value) is None:
        pytest.skip(f"{block.value} is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "__docs__"}
    exec(program, namespace)
    if block.kind == "recipe":
        assert callable(namespace[block.value])


def test_two_names_change_in_the_script_of_the_readme() -> None:
    """The lines with + are those with - under the new names, apart from the module that they come from."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    before, after = (
        "\n".join(line[1:] for line in diff.splitlines() if line[:1] in (" ", sign, "")) for sign in "-+"
    )
    for script in (before, after):
        compile(script, "README.md", "exec")
    names = ("GRPOConfig", "GRPOTrainer")
    for name in names:
        before = re.sub(rf"\b{name}\b", f"Pama{name}", before)
    assert before.replace("from trl import", "from pama_kernels.integrations.trl import") == after
    from_library = importlib.util.find_spec("trl") and importlib.import_module(
        "pama_kernels.integrations.trl"
    )
    assert not from_library or all(hasattr(from_library, f"Pama{name}") for name in names)


def prose(page: Path) -> str:
    """Without the blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them: the second of two equal ones gets the suffix -1."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        same = sum(1 for other in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", other))
        found.add(f"{name}-{same}" if same else name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """Links to files of the repository and to headings of its pages."""
    broken = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)", prose(page)):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_exists(page: Path) -> None:
    """Targets of make, scripts and modules of the repository, in blocks and in the text."""
    text = page.read_text(encoding="utf-8")
    targets = re.findall(
        r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    shells = "".join(code for language, code in fenced if not language)
    shown = re.findall(r"^make (?:-\S+ )?([a-z0-9-]+)", shells, flags=re.MULTILINE)
    assert not {*shown, *re.findall(r"`make (?:-\S+ )?([a-z0-9-]+)", text)} - set(targets)
    scripts = re.findall(r"\bpython ([a-z_/0-9]+\.py)\b", text)
    assert not [script for script in scripts if not (ROOT / script).is_file()]
    for name in re.findall(r"\bpython -m ((?:pama_kernels|benchmarks|study)[a-z_.]*)", text):
        path = ROOT.joinpath(*name.rstrip(".").split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_numbers_of_how_it_works_are_those_of_its_call() -> None:
    """In the comments, and in the picture."""
    page = ROOT / "docs" / "how_it_works.md"
    namespace: dict[str, Any] = {}
    exec(blocks(page)[0].compiled(), namespace)
    picture = (ROOT / "docs" / "pipeline.svg").read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    shown = re.findall(r"print\(combined\.(\w+)\)  # (.*)", page.read_text(encoding="utf-8"))
    assert [name for name, _ in shown] == ["weights", "advantages"]
    for name, numbers in shown:
        found = [f"{value:.2f}" for value in getattr(namespace["combined"], name).tolist()]
        assert found == numbers.split(", ")
        assert all(f">{number}<" in picture for number in found)
