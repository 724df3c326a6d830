"""The arrows of the design: what runs load never imports what analyses, and what analyses never imports Locust."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "twoclocks"
LOAD_SIDE = {"user", "hooks", "master", "fleet", "worker", "selfwatch", "native", "reader"}
HEAVY = {"pandas", "matplotlib", "seaborn", "scipy"}
PATCHING = {"locust", "gevent"}


@functools.cache
def imports_of(module: str) -> set[str]:
    """Every name imported anywhere in a module, also inside functions: `twoclocks.x` as x, others by top name."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module_ = f"twoclocks.{node.module}" if node.level and node.module else node.module or "twoclocks"
            names = [f"twoclocks.{alias.name}" for alias in node.names] if module_ == "twoclocks" else [module_]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            found.add(f"twoclocks.{rest.partition('.')[0]}" if top == "twoclocks" and rest else top)
    return found


def reach(module: str) -> set[str]:
    """All that importing a module may import in the end."""
    seen, todo = set(), {f"twoclocks.{module}"}
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        top, _, inner = name.partition(".")
        if top == "twoclocks" and (PACKAGE / f"{inner}.py").exists():
            todo |= imports_of(inner)
    return seen


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__"))


def test_the_walk_sees_what_is_there():
    assert reach("hooks") >= PATCHING
    assert "twoclocks.sse" in reach("hooks")
    assert "pandas" in reach("load")


@pytest.mark.parametrize("module", sorted(set(MODULES) - LOAD_SIDE))
def test_only_the_load_side_imports_locust(module):
    assert not reach(module) & PATCHING


def test_what_runs_load_draws_nothing():
    assert not reach("hooks") & HEAVY
    assert not reach("collector") & HEAVY


def test_importing_the_package_is_light():
    program = (
        "import sys, twoclocks; print(sorted({'locust', 'gevent', 'torch', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "[]"


def test_nothing_shadows_the_requests_library():
    assert not (PACKAGE.parent / "requests" / "__init__.py").exists()
