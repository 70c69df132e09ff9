"""The tree is the architecture: imports point one way, files and functions stay small, the public names are documented.

Modules are read, not run; TYPE_CHECKING blocks and imports inside functions count like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_mtp

ROOT = Path(__file__).parent.parent
SOURCES = ("mlx_mtp", "convert", "bench", "tests")
MOST_LINES, MOST_FUNCTION_LINES = 400, 60

# From the bottom up: a part may import those below it. Parts in one set do not see each other.
ORDER: tuple[frozenset[str], ...] = tuple(map(frozenset, (
    ["errors", "device", "channels"], ["config_json", "calibration"], ["config"], ["kv_span"], ["kv_cache", "models"],
    ["spec_decode"],
    ["engine", "checkpoint", "tokenizer"], ["demo", "prompt"], ["api"],
    ["command", "prompts_file", "output_file", "progress"], ["batch"], ["generate"],
    ["chat", "check"], ["server"], ["__init__"],
)))
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
ALWAYS_OUTSIDE = ("convert", "bench", "tests")  # they import mlx_mtp; it never imports them
WITHOUT_MLX = ("mlx_mtp.engine.scheduler", "mlx_mtp.engine.request")  # where they exist
HEAVY = ("torch", "transformers", "mlx_lm", "huggingface_hub")


def sources() -> list[Path]:
    return [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    """mlx_mtp/models/moe.py -> mlx_mtp.models.moe; a package's __init__ keeps its name out."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path.read_text() for path in sources() if path.is_relative_to(ROOT / "mlx_mtp")}


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Every module that `source` imports; `from mlx_mtp import x` is mlx_mtp.x if that is a module, else mlx_mtp."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: None if is_package and node.level == 1 else -node.level or None]
            base = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner in MODULES or any(name.startswith(f"{inner}.") for name in MODULES)
                yield inner if is_module or inner.startswith("mlx_mtp.convert") else base


def part_of(module: str) -> str:
    """mlx_mtp.models.moe -> models; mlx_mtp itself -> __init__."""
    return [*module.split("."), "__init__"][1]


def complaints(module: str, source: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module of mlx_mtp."""
    found, own = [], part_of(module)
    for other in imported(source, module, is_package):
        top, part = other.split(".")[0], part_of(other)
        if top in ALWAYS_OUTSIDE or other.startswith("mlx_mtp.convert"):
            found.append(f"{module} imports {other}, which builds on mlx_mtp")
        elif top != "mlx_mtp" or part == own:
            continue
        elif part not in RANK:
            found.append(f"{module} imports {other}, which has no place in ORDER")
        elif own == "demo":
            found.append(f"{module} imports {other}, but the demonstration pair is a leaf")
        elif part == "demo" and own != "api":
            found.append(f"{module} imports {other}, which only api does")
        elif RANK[part] >= RANK[own]:
            found.append(f"{module} imports {other}, which is not below it")
    return found


def is_package(module: str) -> bool:
    return (ROOT / Path(*module.split(".")) / "__init__.py").is_file()


def test_every_part_has_a_place_in_the_order() -> None:
    assert {part_of(module) for module in MODULES} - RANK.keys() == set()
    assert {"errors", "config", "models", "spec_decode", "engine", "checkpoint", "api", "__init__"} <= {
        part_of(module) for module in MODULES
    }


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    assert complaints(module, MODULES[module], is_package(module)) == []


@pytest.mark.parametrize(("module", "source"), [
    ("mlx_mtp.errors", "from mlx_mtp.config import Json"),
    ("mlx_mtp.kv_cache", "from mlx_mtp.models.masks import visible"),
    ("mlx_mtp.models.target", "from mlx_mtp import kv_cache"),
    ("mlx_mtp.models.moe", "import mlx_mtp.spec_decode.loop"),
    ("mlx_mtp.spec_decode.loop", "def run():\n    from mlx_mtp.engine import engine"),
    ("mlx_mtp.engine.engine", "if TYPE_CHECKING:\n    from mlx_mtp.tokenizer import Tokenizer"),
    ("mlx_mtp.checkpoint.hub", "from mlx_mtp.engine.request import Request"),
    ("mlx_mtp.tokenizer", "from mlx_mtp.checkpoint import hub"),
    ("mlx_mtp.api", "from mlx_mtp import generate"),
    ("mlx_mtp.generate", "from mlx_mtp import load"),  # the package's own __init__, which imports api
    ("mlx_mtp.generate", "from mlx_mtp import demo"),
    ("mlx_mtp.demo", "from mlx_mtp.config import SamplingParams"),
    ("mlx_mtp.models.target", "from ..spec_decode import sampler"),
    ("mlx_mtp.api", "from mlx_mtp.convert import quantize"),
    ("mlx_mtp.api", "from bench import card"),
    ("mlx_mtp.api", "import mlx_mtp.helpers"),
])
def test_an_import_that_points_the_wrong_way_is_noticed(module: str, source: str) -> None:
    assert len(complaints(module, source)) == 1


@pytest.mark.parametrize(("module", "source"), [
    ("mlx_mtp.models.target", "from mlx_mtp.models.moe import Router\nfrom .layers import geglu"),
    ("mlx_mtp.checkpoint.memory", "from mlx_mtp.kv_cache import layer_shapes"),
    ("mlx_mtp.api", "from mlx_mtp import demo\nimport mlx.core as mx"),
    ("mlx_mtp.generate", "def main():\n    from mlx_mtp import api"),
])
def test_an_import_that_points_down_is_fine(module: str, source: str) -> None:
    assert complaints(module, source) == []


def test_the_scheduler_and_all_it_imports_are_free_of_mlx() -> None:
    waiting, seen = [module for module in WITHOUT_MLX if module in MODULES], set()
    assert waiting
    while waiting:
        module = waiting.pop()
        seen.add(module)
        for other in imported(MODULES[module], module, is_package(module)):
            assert other.split(".")[0] not in ("mlx", "mlx_lm"), f"{module} imports {other}"
            if other in MODULES and other not in seen:
                waiting.append(other)


def test_files_and_functions_stay_small() -> None:
    too_long = []
    for path in sources():
        source, where = path.read_text(), path.relative_to(ROOT)
        if (lines := len(source.splitlines())) > MOST_LINES:
            too_long.append(f"{where} has {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_FUNCTION_LINES:
                    too_long.append(f"{where}:{node.lineno} {node.name} has {lines} lines")
    assert too_long == []


def test_all_lists_exactly_the_public_names_and_nothing_else_happens_there() -> None:
    tree = ast.parse((ROOT / "mlx_mtp" / "__init__.py").read_text())
    bound = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
             for alias in node.names}
    assert set(mlx_mtp.__all__) == {name for name in bound if not name.startswith("_")}
    assert sorted(mlx_mtp.__all__) == list(mlx_mtp.__all__)
    others = [node for node in tree.body if not isinstance(node, ast.ImportFrom)]
    assert all(isinstance(node, ast.Assign) or node is tree.body[0] for node in others)  # __version__, __all__


@pytest.mark.parametrize("name", mlx_mtp.__all__)
def test_each_public_name_is_documented(name: str) -> None:
    owner = mlx_mtp.api if hasattr(mlx_mtp.api, name) else mlx_mtp
    words = getattr(owner, name).__doc__  # not inspect.getdoc, which is content with a base class's
    assert words
    assert not words.startswith(f"{name}("), "a dataclass makes itself a docstring; this one needs its own"


def in_a_fresh_interpreter(code: str) -> str:
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True,
                         check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, mlx_mtp; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert in_a_fresh_interpreter(code) == "[]"


@pytest.mark.parametrize("first", ["import mlx_mtp.generate", "from mlx_mtp.generate import main", "import mlx_mtp"])
def test_the_command_module_does_not_hide_the_function_of_its_name(first: str) -> None:
    # An unknown setting is refused before the pair is looked at: so the call did reach api.generate.
    code = f"""{first}
import mlx_mtp
try:
    mlx_mtp.generate(None, "text", nonsense=1)
except mlx_mtp.RequestError as error:
    print(error)
"""
    assert "unknown setting 'nonsense'" in in_a_fresh_interpreter(code)
