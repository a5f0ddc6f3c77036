"""Writes the reference of the public names into docs/*.md, from their signatures and docstrings.

    python docs/generate_api.py           # writes; the tests fail where a page differs

A page has marked blocks, which end with <!-- end -->:

    <!-- api: NAME -->        signature, description and parameters of `pama_kernels.NAME`
    <!-- parameters: NAME --> the table of parameters only
    <!-- command: NAME -->    the arguments of `python -m pama_kernels NAME`
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pama_kernels.__main__ as command_line

DOCS = Path(__file__).parent
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(
    r"^<!-- (api|parameters|command): (\S+) -->\n(.*?)^<!-- end -->$", flags=re.DOTALL | re.MULTILINE
)
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
WIDTH = 118
UNBROKEN = "\0"  # a space at which a signature is not wrapped


# --- docstrings ---------------------------------------------------------------------------------------------


class Docstring(NamedTuple):
    before: list[str]  # paragraphs before the first section
    after: list[str]  # and after it
    source: list[str]  # paragraphs "Source: ..."
    items: dict[str, dict[str, str]]  # of Args, Attributes and Raises: name to text
    returns: str


def docstring(of: Any) -> Docstring:
    """The parts of a docstring: paragraphs, and sections whose items are indented."""
    text = inspect.cleandoc(of.__doc__ or "")
    before: list[str] = []
    after: list[str] = []
    source: list[str] = []
    items: dict[str, dict[str, str]] = {}
    returns = ""
    for part in re.split(r"\n\n(?=\S)", text):
        title, _, body = part.partition(":\n")
        if re.match(r"Raises \(.*\)$", title):
            title, body = "Raises", body + "\n"
        if part.startswith("Source: "):
            source.append(part)
        elif title not in SECTIONS:
            (after if items or returns else before).append(part)
        elif title == "Returns":
            returns = textwrap.dedent(body).strip()
        else:
            items[title] = dict(_items(textwrap.dedent(body)))
    return Docstring(before, after, source, items, returns)


def _items(body: str) -> Iterator[tuple[str, str]]:
    """`name: text` at the left edge, with its continuation indented."""
    for item in re.split(r"\n(?=\S)", body.strip()):
        name, _, text = item.partition(":")
        yield name.strip(), " ".join(text.split())


# --- signatures ---------------------------------------------------------------------------------------------


def parameters(of: Any) -> dict[str, inspect.Parameter]:
    """The public parameters by name; those that are passed on to another function (*others) are left out."""
    found = inspect.signature(of).parameters.values()
    passed_on = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        x.name: x
        for x in found
        if x.kind not in passed_on and x.name not in ("self", "cls") and not x.name.startswith("_")
    }


def type_of(parameter: inspect.Parameter) -> str:
    """The annotation; "or None" is left out where None is the default."""
    if parameter.annotation is parameter.empty:
        return ""
    shown = str(getattr(parameter.annotation, "__name__", parameter.annotation))
    shown = re.sub(r"(?:Sequence|list|tuple)\[(\w+)(?:, \.\.\.)?\]", r"list of \1", shown)
    names = shown.split(" | ")
    names = [name for name in names if name not in ("Any", "None")] + ["None"] * ("None" in names)
    if parameter.default is None and "None" in names:
        names.remove("None")
    return " or ".join(names)


def default_of(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "required"
    value = parameter.default
    return f"`{str(value) if type(value).__module__ == 'torch' else repr(value)}`".replace("'", '"')


def signature(name: str, of: Any) -> str:
    """One line, or one line for each group of arguments up to the width of the page."""
    shown = inspect.signature(of)
    listed: list[str] = []
    for x in shown.parameters.values():
        if x.name in ("self", "cls") or (x.name.startswith("_") and x.kind == x.KEYWORD_ONLY):
            continue
        if x.kind == x.KEYWORD_ONLY and not any(y.startswith("*") for y in listed):
            listed.append("*")
        star = {x.VAR_POSITIONAL: "*", x.VAR_KEYWORD: "**"}.get(x.kind, "")
        default = "" if x.default is x.empty else "=" + default_of(x).strip("`")
        listed.append(f"{star}{x.name}{default}")
    made = shown.return_annotation
    result = (
        "" if inspect.isclass(of) or made in (shown.empty, None, "None") else f"{UNBROKEN}->{UNBROKEN}{made}"
    )
    lines = textwrap.wrap(f"{name}({', '.join(listed)}){result}", WIDTH, subsequent_indent="    ")
    return "\n".join(lines).replace(UNBROKEN, " ")


# --- Markdown -----------------------------------------------------------------------------------------------


def cell(text: str) -> str:
    return text.replace("|", r"\|")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell(x) for x in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def parameter_table(of: Any) -> str:
    described = docstring(of).items.get("Args", {})
    rows = [
        (f"`{name}`", type_of(x), default_of(x), described.get(name, ""))
        for name, x in parameters(of).items()
    ]
    return table(("parameter", "type", "default", "meaning"), rows) if rows else ""


def members(of: type) -> dict[str, Any]:
    """Public properties and methods that the class itself defines with a docstring of their own."""
    own = {name: x for name, x in vars(of).items() if not name.startswith("_")}
    own = {name: x.__func__ if isinstance(x, classmethod) else x for name, x in own.items()}
    return {
        name: x
        for name, x in own.items()
        if isinstance(x, property) or (inspect.isfunction(x) and x.__doc__ and not _overrides(of, name))
    }


def _overrides(of: type, name: str) -> bool:
    """Whether a base class from elsewhere has the method too: then its documentation is there."""
    return name != "forward" and any(name in vars(base) for base in of.__mro__[1:])


def member_table(of: type) -> str:
    rows = [(f"`.{name}`", text) for name, text in docstring(of).items.get("Attributes", {}).items()]
    for name, x in members(of).items():
        shown = f".{name}" if isinstance(x, property) else "." + signature(name, x).partition(" -> ")[0]
        text = " ".join(" ".join(docstring(x).before).split())
        rows.append((f"`{' '.join(shown.split())}`", text))
    return table(("member", "meaning"), rows) if rows else ""


def reference(name: str) -> str:
    """Signature, description and parameters of `pama_kernels.NAME`."""
    of = resolve(name)
    doc = docstring(of)
    short = name.rpartition(".")[2]
    parts = [f"### {short}\n"]
    if "Args" in doc.items or "Attributes" not in doc.items:  # else the user gets it from a function
        parts.append(f"```text\n{signature(short, of)}\n```\n")
    parts += [f"{x}\n" for x in doc.before]
    if "Args" in doc.items:
        parts.append(parameter_table(of))
    if inspect.isclass(of):
        parts.append(member_table(of))
    if doc.returns:
        parts.append(f"**Returns** {doc.returns}\n")
    parts += [f"{x}\n" for x in doc.after]
    for errors, text in doc.items.get("Raises", {}).items():
        parts.append(f"**Raises** {' or '.join(f'`{x}`' for x in errors.split(', '))}: {text}\n")
    parts += [f"{x}\n" for x in doc.source]
    return "\n".join(part for part in parts if part)


def command(name: str) -> str:
    """The arguments of a command, as its --help prints them."""
    commands = next(x for x in command_line.parser()._actions if isinstance(x, argparse._SubParsersAction))
    parser = commands.choices[name]
    rows, usage = [], []
    text = parser.description or ""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = action.metavar or (action.dest.upper() if action.option_strings and action.nargs != 0 else "")
        value = value or ("" if action.option_strings else action.dest)
        more = {"+": f"{value} ...", "?": f"[{value}]"}.get(str(action.nargs), value)
        shown = " ".join([*action.option_strings, str(more)]).strip()
        help_text = (action.help or "") % {**vars(action), "prog": parser.prog}
        rows.append((f"`{shown}`", help_text))
        usage.append(UNBROKEN.join((f"[{shown}]" if action.option_strings else shown).split(" ")))
    usage.sort(key=lambda argument: argument.startswith("["))  # the positional arguments first
    called = textwrap.fill(
        " ".join([f"{command_line.PROGRAM} {name}", *usage]),
        WIDTH,
        subsequent_indent="    ",
        break_on_hyphens=False,
    ).replace(UNBROKEN, " ")
    return f"### {name}\n\n```text\n{called}\n```\n\n{text[0].upper()}{text[1:]}.\n\n" + table(
        ("argument", "meaning"), rows
    )


def resolve(name: str) -> Any:
    """The object `pama_kernels.NAME`; its module is imported."""
    module, _, last = f"pama_kernels.{name}".rpartition(".")
    __import__(module)
    root = __import__("pama_kernels")
    return attrgetter(name)(root) if "." in name else getattr(root, last)


KINDS: dict[str, Callable[[str], str]] = {
    "api": reference,
    "parameters": lambda name: parameter_table(resolve(name)),
    "command": command,
}


def filled(text: str) -> str:
    """The page with every marked block written anew."""

    def block(found: re.Match[str]) -> str:
        kind, name, _ = found.groups()
        return f"<!-- {kind}: {name} -->\n{KINDS[kind](name)}<!-- end -->"

    return BLOCK.sub(block, text)


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
