"""Imports go one way: read from the sources, held to the table of allowed arrows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bicache_jax.models import registered

PACKAGE = Path(__file__).parents[1] / "bicache_jax"

# What each part may import besides itself. Parts at the top of the package are single files.
ARROWS: dict[str, set[str]] = {
    "core": set(),
    "sharding": {"core"},
    "checkpoints": {"core", "sharding"},
    "kernels": {"core"},
    "configs": {"core"},
    "models": {"core", "checkpoints"},
    "wiring": {"core", "kernels", "configs", "models"},
    "decoding": {"core", "sharding"},
    "conformance": {"core", "sharding"},
    "testing": {"core", "kernels", "conformance"},
    "functional": {"core", "decoding", "wiring"},
    "serving": {"core", "sharding", "decoding", "wiring"},
    "loading": {"core", "sharding", "checkpoints", "configs", "models"},
    "convert": {"core", "checkpoints", "loading"},
    "bulk": {"core", "serving"},
    "measure": {"core", "sharding", "decoding", "serving", "wiring", "testing"},
    "display": {"core", "serving"},
    "example": {"core"},
    "harness": {"core", "serving", "bulk"},
    "cli": {
        *("core", "sharding", "checkpoints", "serving", "bulk", "measure", "display", "example"),
        *("loading", "convert", "wiring", "harness"),
    },
    "lm_eval": {"core", "cli", "harness"},
}
FACES = {"__init__", "__main__"}  # what a user calls; they may import anything


def part_of(path: Path) -> str:
    """The subpackage of a file, or its name where it stands at the top."""
    inside = path.relative_to(PACKAGE).parts
    return inside[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "bicache_jax" else [f"bicache_jax.{a.name}" for a in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "bicache_jax" and rest:
                found.add(rest.split(".")[0])
    return found


SOURCES = sorted(path for part in PACKAGE.iterdir() for path in ([part] if part.is_file() else part.rglob("*.py")))


def test_every_part_is_in_the_table():
    assert {part_of(path) for path in SOURCES if path.suffix == ".py"} == set(ARROWS) | FACES


@pytest.mark.parametrize("part", sorted(ARROWS))
def test_imports_follow_the_arrows(part):
    for path in SOURCES:
        if path.suffix == ".py" and part_of(path) == part:
            extra = imported_parts(path) - ARROWS[part] - {part}
            assert not extra, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(extra))}"


def test_the_arrows_form_no_circle():
    order: list[str] = []
    while len(order) < len(ARROWS):
        free = sorted(part for part, below in ARROWS.items() if part not in order and below <= set(order))
        assert free, f"a circle among {sorted(set(ARROWS) - set(order))}"
        order += free


def test_only_the_top_of_the_package_knows_models_and_kernels():
    knowing = {part for part, below in ARROWS.items() if below & {"models", "kernels"}}
    assert knowing == {"wiring", "loading", "testing"}
    assert all((PACKAGE / f"{part}.py").is_file() for part in knowing)


# Where a family is data on its `ModelConfig`, never a name.
NAMELESS = (
    "core",
    "sharding",
    "decoding",
    "serving",
    "bulk",
    "measure",
    "harness",
    "functional",
    "wiring",
    "conformance",
)


def family_names(tree: ast.AST) -> list[ast.AST]:
    """Where a source asks which family a model is of: a name as a string of its own, or the field that holds it."""
    names = {name.lower() for family in registered().values() for name in family.model_types} | set(registered())
    return [
        node
        for node in ast.walk(tree)
        if (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.lower() in names)
        or (isinstance(node, ast.Attribute) and node.attr == "family")
    ]


@pytest.mark.parametrize("part", NAMELESS)
def test_no_family_is_told_by_its_name(part):
    for path in SOURCES:
        if path.suffix == ".py" and part_of(path) == part:
            found = family_names(ast.parse(path.read_text(encoding="utf-8")))
            assert not found, f"{path.relative_to(PACKAGE)}:{found[0].lineno} asks for a family"


@pytest.mark.parametrize("source", ['config.family == "x"', 'x == "Dream"', 'RULES["llada"]', 'RULES.get("dream")'])
def test_names_of_families_are_noticed(source):
    assert family_names(ast.parse(source))
