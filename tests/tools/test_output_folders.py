"""Commands run with their defaults leave the committed results as they are."""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "examples", "study", "wheels")
COMMANDS = [
    path.relative_to(ROOT)
    for path in (
        *sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")),
        ROOT / "tests/run_gpu.py",
    )
    if "ArgumentParser(" in path.read_text(encoding="utf-8") and '"--out"' in path.read_text(encoding="utf-8")
]


class Parsed(Exception):
    """In place of the command's work."""


def parser_of(command: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser with which the command reads its arguments."""
    found = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        found.append(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / command.parent))
    package = (ROOT / command.parent / "__init__.py").is_file()
    module = ".".join(command.with_suffix("").parts) if package else command.stem
    try:
        with pytest.raises(Parsed):
            importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: {command} needs it")
    return found[0]


def ignored(path: Path) -> bool:
    command = ["git", "-C", str(ROOT), "check-ignore", "-q", str(path)]
    return subprocess.run(command, check=False).returncode == 0


needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout"
)


def test_commands_were_found() -> None:
    assert {Path("examples/align_language_model.py"), Path("study/__main__.py")} < set(COMMANDS)


@needs_git
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_default_output_folder_is_ignored_by_git(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(command, monkeypatch)
    (action,) = (a for a in parser._actions if "--out" in a.option_strings)
    if action.default is None:
        assert "temporary folder" in (action.help or ""), f"{command}: --out has no default"
    else:
        assert ignored(Path(action.default) / "file"), f"{command}: --out is {action.default}"


@needs_git
def test_the_check_sees_committed_results() -> None:
    for folder in FOLDERS[:3]:
        assert not ignored(ROOT / folder / "results" / "file")


def test_make_targets_write_no_committed_results() -> None:
    """The commands of the Makefile use the default folders."""
    recipes = re.findall(r"^\t.*", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert any("examples/align_language_model.py" in recipe for recipe in recipes)
    assert not [recipe for recipe in recipes if "/results" in recipe or "--out " in recipe]
