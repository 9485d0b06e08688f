"""The package as others see it: public names, what an import costs, and which way imports go."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import evomerge

PACKAGE = Path(evomerge.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# design.md, "Layout": imports go one way. A unit may import itself and what stands before it.
ORDER = (
    "errors",
    "yamlfile",
    "resources",
    "recipe",
    "sources",
    "inspect",
    "search",
    "layers",
    "space_checks",
    "space",
    "merge",
    "catalogue",
    "engine",
    "statistics",
    "evaluate",
    "study",
    "report",
    "export",
    "model",
    "config",
    "build",
    "template",
    "check",
    "status",
    "live",
    "cli",
    "__main__",
)
HEAVY = {"torch", "transformers", "vllm"}
WITHOUT_HEAVY = (
    "errors",
    "yamlfile",
    "recipe",
    "layers",
    "space_checks",
    "space",
    "search",
    "study",
    "evaluate",
    "config",
    "report",
)


def unit(path: Path) -> str:
    """First part of a module's path inside the package: `search` for search/cma.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, *, inside_functions: bool) -> set[str]:
    """Dotted names that a module imports; `TYPE_CHECKING` blocks do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def own_units(path: Path) -> set[str]:
    names = imported(path, inside_functions=True)
    parts = {name.split(".")[1] for name in names if name.startswith("evomerge.") and name.count(".")}
    return {part for part in parts if part in ORDER}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path: Path):
    if unit(path) == "__init__":
        return
    place = ORDER.index(unit(path))
    assert {name for name in own_units(path) if ORDER.index(name) > place} == set()


@pytest.mark.parametrize("path", [p for p in MODULES if unit(p) in WITHOUT_HEAVY], ids=str)
def test_the_outer_loop_imports_no_heavy_library(path: Path):
    heavy = {name.split(".")[0] for name in imported(path, inside_functions=False)} & HEAVY
    assert heavy == set()


@pytest.mark.parametrize("path", [p for p in MODULES if unit(p) == "merge"], ids=str)
def test_the_merger_knows_nothing_of_space_and_search(path: Path):
    assert own_units(path) & {"space", "search"} == set()


@pytest.mark.parametrize(
    "path", [p for p in MODULES if unit(p) not in ("build", "cli", "check", "config", "__init__")], ids=str
)
def test_only_the_builders_know_the_configuration(path: Path):
    assert "config" not in own_units(path)


@pytest.mark.parametrize("name", ["evomerge", "evomerge.study.study", "evomerge.space", "evomerge.search"])
def test_importing_the_outer_loop_loads_no_torch(name: str):
    code = f"import sys, {name}; print(sorted({{'torch', 'vllm', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_loads_nothing_heavy_at_all():
    code = "import sys, evomerge; print(sorted({'torch', 'optuna', 'vllm', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_these():
    assert evomerge.__all__ == [
        "EvomergeError",
        "Recipe",
        "RunConfig",
        "SearchSpace",
        "Study",
        "Suite",
        "__version__",
        "evaluate_model",
        "load_config",
        "merge_model",
        "resume_search",
        "run_search",
    ]


@pytest.mark.parametrize("name", evomerge.__all__)
def test_every_public_name_can_be_had(name: str):
    assert getattr(evomerge, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        evomerge.serach  # noqa: B018


def test_no_module_outgrows_its_budget():
    """design.md: modules of about 200 lines, 500 at most."""
    assert [str(p) for p in MODULES if len(p.read_text(encoding="utf-8").splitlines()) > 500] == []
