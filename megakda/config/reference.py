"""The settings reference in ``recipes/README.md``, from the schema's source and the recipe files.

``python -m megakda.config.reference`` writes it anew after a change of either; the text above the
mark in that file is written by hand and stays.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from megakda.config import schema
from megakda.config.compose import recipes_dir
from megakda.errors import ConfigError

MARK = "<!-- From here on: python -m megakda.config.reference -->"
REQUIRED = "???"
"""OmegaConf's default of a setting that has none."""


@dataclass(frozen=True)
class Setting:
    """One leaf of the tree."""

    name: str  # dotted
    type: str
    default: str  # as YAML; empty where a recipe has to give a value
    choices: tuple[str, ...]
    comment: str


@dataclass(frozen=True)
class Section:
    """One dataclass of the schema at its place in the tree; the root's name is empty."""

    name: str
    text: str
    settings: tuple[Setting, ...]


def sections() -> list[Section]:
    """Every section of the schema, groups in the order of the tree, parents before children."""
    return list(_sections(schema.Config, "", _Source()))


def render(readme: str, recipes: Path) -> str:
    """`readme` with everything below the mark written anew.

    Raises:
        ConfigError: `readme` has no mark.
    """
    written, mark, _ = readme.partition(MARK)
    if not mark:
        raise ConfigError(f"{recipes / 'README.md'} has no line {MARK!r}: put it back")
    parts = [
        MARK,
        "## Recipes",
        *(_recipes_of(group) for group in sorted(recipes.iterdir()) if group.is_dir()),
        "## Settings",
        *map(_table, sections()),
    ]
    return written + "\n\n".join(parts) + "\n"


def main() -> None:
    """Rewrites the README of the recipe tree."""
    path = recipes_dir() / "README.md"
    path.write_text(render(path.read_text(), path.parent))
    print(path)


class _Source:
    """What the schema's source says that its objects do not: comments and written docstrings."""

    def __init__(self) -> None:
        text = inspect.getsource(schema)
        self._comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        }
        self._classes = {
            node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)
        }

    def docstring(self, cls: type) -> str:
        """The class docstring; empty where dataclasses would make one up."""
        return ast.get_docstring(self._classes[cls.__name__]) or ""

    def comment(self, cls: type, name: str) -> str:
        """The comments on the lines of one field."""
        for node in self._classes[cls.__name__].body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                return " ".join(self._comments[n] for n in lines if n in self._comments)
        raise AssertionError(f"{cls.__name__}.{name} is not in the source")


def _sections(cls: Any, name: str, source: _Source) -> Iterator[Section]:
    prefix = f"{name}." if name else ""
    own: list[Setting] = []
    below: list[tuple[Any, str]] = []
    for field in fields(cls):
        if is_dataclass(field.default_factory):
            below.append((field.default_factory, f"{prefix}{field.name}"))
        else:
            own.append(
                Setting(
                    f"{prefix}{field.name}",
                    str(field.type),
                    _default(field),
                    tuple(field.metadata.get("choices", ())),
                    source.comment(cls, field.name),
                )
            )
    yield Section(name, source.docstring(cls), tuple(own))
    for child, path in below:
        yield from _sections(child, path, source)


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return _yaml(field.default_factory())
    return "" if field.default == REQUIRED else _yaml(field.default)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


def _table(section: Section) -> str:
    lines = [f"### `{section.name}`" if section.name else "### The top level", section.text]
    if section.settings:
        head = ["| setting | type | default | values and meaning |", "|---|---|---|---|"]
        rows = [*head, *map(_row, section.settings)]
        lines.append("\n".join(rows))
    return "\n\n".join(filter(None, lines))


def _row(setting: Setting) -> str:
    says = [setting.comment]
    if setting.choices:
        says.insert(0, "one of " + ", ".join(map(_code, setting.choices)))
    default = _code(setting.default) if setting.default else "from the recipe"
    cells = [_code(setting.name), _code(setting.type), default, "; ".join(filter(None, says))]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _recipes_of(group: Path) -> str:
    rows = [
        f"| `{group.name}={path.relative_to(group).with_suffix('')}` | {_summary(path)} |"
        for path in sorted(group.rglob("*.yaml"))
    ]
    return "\n".join([f"### `{group.name}`", "", "| recipe | what it is |", "|---|---|", *rows])


def _summary(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with, or else its lines."""
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    comments: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comments.append(line.lstrip("# "))
    if not comments:
        return ", ".join(map(_code, lines))
    sentence, end, _ = f"{' '.join(comments)} ".partition(". ")
    return (sentence + end).strip().replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    main()
