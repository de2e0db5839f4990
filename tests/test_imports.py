"""Imports point one way, read from the source of every file; imports inside functions count too.

An import under ``if TYPE_CHECKING:`` never runs and does not count.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import megakda

ROOT = Path(megakda.__file__).resolve().parents[1]

RANKS = {
    # What everything may use, and what knows of nothing but itself.
    "megakda": 0,  # the version number
    "megakda.errors": 0,
    "megakda.locks": 0,
    "megakda.kernels": 0,  # torch and triton alone, so that it can be lifted out
    "megakda.config": 1,
    "megakda.runtime": 2,
    # The one data path: tokens -> layers -> model -> optimizer -> checkpoint -> loop.
    "megakda.guard": 3,
    "megakda.layers": 3,
    "megakda.data": 3,
    "megakda.models": 4,
    "megakda.optim": 5,
    "megakda.checkpoint": 5,
    "megakda.metrics": 6,
    "megakda.trainer": 7,
    # Where a person comes in.
    "megakda.train": 8,
    "megakda.plan": 8,
    "megakda.inference": 8,
    "megakda.bench": 9,
    "megakda.evaluation": 9,
    "megakda.serving": 9,
}
"""A file imports from its own package and from packages of a lower rank, never from an equal one:
two packages of one rank do not know each other, so either can be understood, tested or replaced
alone. A new package needs a line here, and with it a decision about what it may know."""

NO_MEGATRON = [
    # What runs before `megakda.runtime.install`, in tools, or where no model is built.
    "megakda.config",
    "megakda.errors",
    "megakda.kernels",
    "megakda.runtime",
    "megakda.guard",
    "megakda.train",
    "megakda.data.tokenizer",
    "megakda.data.tokenizer_base",
    "megakda.data.tiktoken_tokenizer",
    "megakda.data.chat",
    "megakda.data.chat_template",
    "megakda.data.preprocess",
    "megakda.data.indexed",
    "megakda.data.corpus",
    "megakda.data.lengths",
    "megakda.data.packing",
    "megakda.models.context_cost",
    "megakda.models.context_balance",
    "megakda.models.exchange_model",
    "megakda.models.cache_size",
    "megakda.checkpoint.folders",
    "megakda.checkpoint.stored",
    "megakda.checkpoint.stored_reader",
    "megakda.checkpoint.stored_writer",
    "megakda.checkpoint.convert",
    "megakda.checkpoint.inspection",
    "megakda.checkpoint.hf_import",
    "megakda.checkpoint.hf_export",
    "megakda.inference.request",
    "megakda.inference.choice",
    "megakda.metrics.writers",
    "megakda.metrics.progress",
    "megakda.metrics.plot",
    "megakda.metrics.schedule_plot",
    "megakda.models.params",
    "megakda.models.flops",
]
"""Importing any of these, or a module below it, must not import megatron-core."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted((ROOT / "megakda").rglob("*.py"))}


def imported(node: ast.AST, inside_functions: bool = True) -> Iterator[str]:
    """Absolute names of the modules that the code below `node` imports."""
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import of {node.module} in line {node.lineno}"
        for alias in node.names:  # a name in a package may be a module of its own
            name = f"{node.module}.{alias.name}"
            yield name if name in SOURCES else str(node.module)
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = node.orelse
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
        children = ()
    for child in children:
        yield from imported(child, inside_functions)


IMPORTS = {name: set(imported(ast.parse(path.read_text()))) for name, path in SOURCES.items()}
IMPORTS_AT_LOAD = {
    name: set(imported(ast.parse(path.read_text()), inside_functions=False))
    for name, path in SOURCES.items()
}


def package(module: str) -> str:
    """The entry of `RANKS` that a module of megakda belongs to."""
    return ".".join(module.split(".")[:2])


def is_below(module: str, parent: str) -> bool:
    return f"{module}.".startswith(f"{parent}.")


def test_the_reader_finds_imports_wherever_they_are():
    source = """
import a.b
from megakda import errors, __version__
if TYPE_CHECKING:
    from never import x
else:
    import c
def f():
    import d
    class G:
        from e import y
try:
    import g
except ImportError:
    pass
"""
    tree = ast.parse(source)
    at_load = ["a.b", "megakda.errors", "megakda", "c", "g"]
    assert sorted(imported(tree, inside_functions=False)) == sorted(at_load)
    assert sorted(imported(tree)) == sorted([*at_load, "d", "e"])
    assert {"megakda.train", "megakda.layers.kda", "megakda.kernels"} <= SOURCES.keys()


def test_every_package_has_a_rank():
    assert {package(name) for name in SOURCES} == RANKS.keys()


def test_imports_point_down():
    wrong = [
        f"{module} (rank {RANKS[package(module)]}) imports {name} (rank {RANKS[package(name)]})"
        for module, names in IMPORTS.items()
        for name in names
        if is_below(name, "megakda")
        and package(name) != package(module)
        and RANKS[package(name)] >= RANKS[package(module)]
    ]
    assert not wrong, wrong


def foreign(modules: dict[str, set[str]], parent: str, allowed: set[str]) -> list[str]:
    """Imports below `parent` of top-level packages that are not in `allowed`."""
    assert any(is_below(module, parent) for module in modules)
    return [
        f"{module} imports {name}"
        for module, names in modules.items()
        if is_below(module, parent)
        for name in sorted(names)
        if name.split(".")[0] not in allowed and not is_below(name, parent)
    ]


def test_kernels_import_torch_and_triton_alone():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    # Checks of kernels on a machine without a GPU: triton's interpreter works on numpy arrays.
    checks = "megakda.kernels.verify"
    kernels = {name: x for name, x in IMPORTS.items() if not is_below(name, checks)}
    assert not foreign(kernels, "megakda.kernels", allowed)
    assert not foreign(IMPORTS, checks, {"megakda", "numpy", *allowed})
    assert not any(is_below(x, checks) for names in kernels.values() for x in names)


def test_kernels_load_without_triton():
    """It is no dependency where there is no GPU: operators import their kernels when they run."""
    operators = [name for name in SOURCES if is_below(name, "megakda.kernels")]
    operators = [
        name
        for name in operators
        if not name.endswith("_triton") and not is_below(name, "megakda.kernels.verify")
    ]
    wrong = {
        name: sorted(
            x for x in IMPORTS_AT_LOAD[name] if x.split(".")[0] == "triton" or x.endswith("_triton")
        )
        for name in operators
    }
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("parent", ["megakda.layers", "megakda.models", "megakda.optim"])
def test_the_recipe_tree_ends_above_the_model(parent):
    """Typed settings come down, Hydra's tree does not: no hydra, no omegaconf."""
    allowed = {"megakda", "megatron", "torch", *sys.stdlib_module_names}
    assert not foreign(IMPORTS, parent, allowed)


def loaded(module: str) -> set[str]:
    """Every module that importing `module` of megakda imports through megakda's own files."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        if name in SOURCES:
            parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
            todo += [*IMPORTS_AT_LOAD[name], *parents]
    return found


def test_megatron_stays_out_where_it_is_not_needed():
    gone = [entry for entry in NO_MEGATRON if not any(is_below(name, entry) for name in SOURCES)]
    assert not gone, f"correct NO_MEGATRON: {gone}"
    wrong = [
        f"importing {module} imports {name}"
        for module in SOURCES
        if any(is_below(module, entry) for entry in NO_MEGATRON)
        for name in loaded(module)
        if is_below(name, "megatron")
    ]
    assert not wrong, wrong
    assert any(is_below(name, "megatron") for name in loaded("megakda.trainer"))  # seen if there


def test_tools_are_thin():
    """Command lines over the package: what needs another library belongs in megakda."""
    tools = sorted((ROOT / "tools").rglob("*.py"))
    imports = {f"tools.{path.stem}": set(imported(ast.parse(path.read_text()))) for path in tools}
    assert not foreign(imports, "tools", {"megakda", "psutil", *sys.stdlib_module_names})


# Folders in which a machine's owner keeps things. /proc and the like are the same everywhere.
ABSOLUTE = re.compile(
    r"(?<![\w.}/:-])/(?:home|root|Users|work|workspace|mnt|media|opt|srv|scratch|nfs|lustre|usr)\b"
)


@pytest.mark.parametrize("folder", ["tests", "recipes"])
def test_no_path_of_one_machine(folder):
    files = [p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in {".py", ".yaml", ".json"}]
    assert len(files) > 10
    assert ABSOLUTE.search("train.out=/home/someone") and not ABSOLUTE.search("https://a/work/b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if ABSOLUTE.search(line)
    ]
    assert not found, found
