"""Structure of the code: no import circles, and imports between packages that point one way only.

Imports are read from the source: those at the top of a module and those inside functions count alike.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUBPACKAGE = "nemo.collections.llm.modelopt"
BASE = "nemo_modelopt_dropin"
COMMANDS = "nemo_modelopt_cli"
FOLDERS = ("nemo", BASE, COMMANDS, "scripts", "benchmarks", "test_code")

# The jobs of compress measure with the subpackage's own passes over held-out data, on its ranks.
SHARED = (f"{SUBPACKAGE}._heldout", f"{SUBPACKAGE}._parallel")

Edges = dict[str, dict[str, int]]


def modules(root: Path) -> dict[str, Path]:
    """Return the modules below a root, by name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> Edges:
    """Return module -> imported module of ours -> line of the import."""
    known = modules(root)
    found: Edges = defaultdict(dict)
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for target, line in _targets(ast.parse(path.read_text(encoding="utf-8")), package):
            owner = target
            while owner and owner not in known:
                owner = owner.rpartition(".")[0]
            if owner and owner != name:
                found[name].setdefault(owner, line)
    return found


def _targets(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Yield the dotted name and the line of everything that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *([base] if base else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def circles(edges: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Return the groups of modules that import each other in a circle (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in edges.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for node in list(edges):
        if node not in index:
            visit(node)
    return found


def arrows(edges: Mapping[str, Mapping[str, int]], source: str, *targets: str) -> list[str]:
    """Return the imports from a package to others, as ``module:line -> module``."""
    return [
        f"{name}:{line} -> {target}"
        for name in sorted(edges)
        for target, line in sorted(edges[name].items())
        if _within(name, source) and any(_within(target, one) for one in targets)
    ]


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def private_imports(edges: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return the imports of a private module (``_x``) from outside of the package that it belongs to."""
    found = []
    for name in sorted(edges):
        for target, line in sorted(edges[name].items()):
            parts = target.split(".")
            private = next((place for place, part in enumerate(parts) if _is_private(part)), None)
            if private is not None and not _within(name, ".".join(parts[:private])):
                found.append(f"{name}:{line} -> {target}")
    return found


def _is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


@pytest.fixture(scope="module")
def edges() -> Edges:
    return imports(ROOT)


def test_no_modules_import_each_other_in_a_circle(edges):
    assert circles(edges) == []


def test_the_base_imports_neither_the_commands_nor_the_subpackage(edges):
    assert arrows(edges, BASE, COMMANDS, SUBPACKAGE) == []


def test_the_subpackage_does_not_import_the_commands(edges):
    assert arrows(edges, SUBPACKAGE, COMMANDS) == []


@pytest.mark.parametrize("package", [BASE, COMMANDS, SUBPACKAGE])
def test_the_product_does_not_import_tests_scripts_or_benchmarks(edges, package):
    assert arrows(edges, package, "test_code", "scripts", "benchmarks") == []


def test_benchmarks_are_imported_only_by_their_own_tests(edges):
    found = arrows(edges, "test_code", "benchmarks")
    assert [one for one in found if not one.startswith("test_code.repository.test_benchmarks:")] == []


def test_private_modules_are_imported_only_within_their_package(edges):
    product = {name: targets for name, targets in edges.items() if _within(name, "nemo") or _is_ours(name)}
    found = [one for one in private_imports(product) if not one.endswith(SHARED)]
    assert found == []
    assert all(f"{COMMANDS}.compress" in one for one in private_imports(product))


def _is_ours(name: str) -> bool:
    return _within(name, BASE) or _within(name, COMMANDS)


def _write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / (name.replace("__", "/").replace("PRIVATE", "_private") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "back",
    ["import nemo_modelopt_dropin.a", "from nemo_modelopt_dropin import a", "from . import a", "from .a import x"],
)
@pytest.mark.parametrize("late", [False, True])
def test_planted_circle_is_found(tmp_path, back, late):
    back = f"def function():\n    {back}" if late else back
    root = _write(
        tmp_path,
        nemo_modelopt_dropin__a="from nemo_modelopt_dropin import b",
        nemo_modelopt_dropin__b="from nemo_modelopt_dropin.c import x",
        nemo_modelopt_dropin__c=back,
        nemo_modelopt_dropin__d="from nemo_modelopt_dropin import a",
    )
    assert circles(imports(root)) == [[f"nemo_modelopt_dropin.{name}" for name in "abc"]]


def test_planted_arrows_are_found(tmp_path):
    root = _write(
        tmp_path,
        nemo_modelopt_dropin__a="def f():\n    from nemo_modelopt_cli import parser",
        nemo_modelopt_cli__parser="",
        nemo_modelopt_cli__room__PRIVATE="",
        nemo_modelopt_cli__room__public="from . import _private",
        nemo_modelopt_cli__other="from nemo_modelopt_cli.room import _private",
    )
    found = imports(root)
    assert arrows(found, BASE, COMMANDS) == ["nemo_modelopt_dropin.a:2 -> nemo_modelopt_cli.parser"]
    assert private_imports(found) == ["nemo_modelopt_cli.other:1 -> nemo_modelopt_cli.room._private"]
