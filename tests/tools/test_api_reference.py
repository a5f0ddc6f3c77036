"""The reference in docs/*.md is what docs/generate_api.py writes, and the docstrings are complete."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import pama_kernels as pk
from pama_kernels import __main__ as command_line

GENERATOR = Path(__file__).parents[2] / "docs" / "generate_api.py"
spec = importlib.util.spec_from_file_location("generate_api", GENERATOR)
assert spec is not None
assert spec.loader is not None
generate_api = importlib.util.module_from_spec(spec)
sys.modules["generate_api"] = generate_api
spec.loader.exec_module(generate_api)

BLOCKS = [
    (page, *found.groups())
    for page in generate_api.PAGES
    for found in generate_api.BLOCK.finditer(page.read_text(encoding="utf-8"))
]
NAMES = [name for _, kind, name, _ in BLOCKS if kind != "command"]
FUNCTIONS_AND_CLASSES = [name for name in pk.__all__ if callable(getattr(pk, name))]
REQUIRED = {"trl": "trl", "sb3": "stable_baselines3"}  # the adapters that are not importable without
ADAPTERS = {
    "trl": ["PamaOptions", "PamaGRPOTrainer", "PamaRLOOTrainer"],
    "sb3": ["PamaPPO", "VectorReward", "make_env", "make_vec_env", "VecNormalizeObjectives", "ValueHeads"],
    "verl": ["Settings", "check", "compute_pama_advantage", "compute_pama_policy_loss"],
}


def resolve(name: str) -> Any:
    adapter = name.split(".")[1] if name.startswith("integrations.") else ""
    if adapter in REQUIRED:
        pytest.importorskip(REQUIRED[adapter])
    return generate_api.resolve(name)


@pytest.mark.parametrize(
    ("page", "kind", "name", "text"), BLOCKS, ids=[f"{x[0].name}:{x[2]}" for x in BLOCKS]
)
def test_page_is_generated(page: Path, kind: str, name: str, text: str) -> None:
    if kind != "command":
        resolve(name)
    assert text == generate_api.KINDS[kind](name), f"{page.name}: run python docs/generate_api.py"


def test_every_public_name_has_a_block() -> None:
    adapters = [f"integrations.{adapter}.{name}" for adapter, names in ADAPTERS.items() for name in names]
    assert sorted(NAMES) == sorted([*FUNCTIONS_AND_CLASSES, *adapters])
    options = command_line.parser()._subparsers
    assert options is not None
    commands = options._group_actions[0].choices
    assert commands is not None
    assert [name for _, kind, name, _ in BLOCKS if kind == "command"] == ["inspect", "plot", "info"]
    assert set(commands) == {"inspect", "plot", "info"}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_exports_what_is_documented(adapter: str) -> None:
    module = resolve(f"integrations.{adapter}.{ADAPTERS[adapter][0]}").__module__.rpartition(".")[0]
    exported = set(importlib.import_module(f"{module}.{adapter}").__all__)
    # Configurations have the settings of `PamaOptions`; LOSS_TYPES is a constant.
    assert exported - set(ADAPTERS[adapter]) <= {
        "GRPOOptions",
        "LOSS_TYPES",
        "PamaGRPOConfig",
        "PamaRLOOConfig",
    }
    assert set(ADAPTERS[adapter]) <= exported


@pytest.mark.parametrize("name", NAMES)
def test_docstring_describes_every_parameter(name: str) -> None:
    public = resolve(name)
    doc = generate_api.docstring(public)
    assert doc.before
    is_result = inspect.isclass(public) and "Attributes" in doc.items and "Args" not in doc.items
    if is_result:
        fields = getattr(public, "_fields", None) or public.__slots__
        assert sorted(doc.items["Attributes"]) == sorted(fields)
    else:
        assert list(doc.items.get("Args", {})) == list(generate_api.parameters(public))
    texts = [text for section in doc.items.values() for text in section.values()]
    assert all(texts)
    if inspect.isfunction(public) and inspect.signature(public).return_annotation not in ("None", "VecEnv"):
        assert doc.returns or name.endswith("make_env")


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(getattr(pk, name, None))])
def test_every_public_member_of_a_class_is_documented(name: str) -> None:
    public = getattr(pk, name)
    own = {x for x in vars(public) if not x.startswith("_")}
    fields = set(getattr(public, "_fields", ())) | set(getattr(public, "__slots__", ()))
    if is_dataclass(public):
        fields |= set(public.__dataclass_fields__)
    inherited = {x for x in own if any(x in vars(base) for base in public.__mro__[1:])} - {"forward"}
    assert own - fields - inherited == set(generate_api.members(public))


@pytest.mark.parametrize("name", ["inspect", "plot", "info"])
def test_every_argument_of_a_command_has_help(name: str) -> None:
    rows = [line for line in generate_api.command(name).splitlines() if line.startswith("| `")]
    assert rows
    assert all(row.split(" | ", 1)[1].strip(" |") for row in rows)


def test_every_rule_is_in_the_table_of_rules() -> None:
    text = (GENERATOR.parent / "rules.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for rule in pk.rules.__all__:
        assert any(row.startswith(f"| `{rule}(") for row in rows), rule
    for name in pk.rules.NAMES:
        assert any(f'"{name}"' in row.split(" | ")[0] for row in rows), name
