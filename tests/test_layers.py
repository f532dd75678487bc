"""
Imports go one way, commands → parts → models → {common, ops}.
The checker takes a root, so that it can be shown to fail.
"""

import ast
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each layer and what of `src` it may import besides itself.
BELOW = {
    "command": {"common", "ops", "models", "part"},
    "part": {"common", "ops", "models"},
    "models": {"common", "ops"},
    "common": set(),
    "ops": set(),
}
EAGER_COMMAND = sys.stdlib_module_names | {"simple_parsing"}
EAGER_COMMON = EAGER_COMMAND | {"pydantic"}
ALL_OPS = sys.stdlib_module_names | {"torch", "numpy", "scipy", "pydantic"}
MODEL_LIBRARIES = {"transformers", "trl", "peft"}
MODEL_LIBRARY_HOMES = {"models", "training", "embedding"}


class Import(NamedTuple):
    module: str
    line: int
    lazy: bool  # inside a function, or only for type checkers
    relative: bool


@cache
def imports_of(code: str) -> tuple[Import, ...]:
    """`imports` of a module's text. Kept: the tests ask for the whole tree again and again, one file of it changed."""
    return tuple(imports(ast.parse(code)))


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Every import of a module, nested ones too; `from a import b` counts as a.b, for b may be a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(f"{node.module or ''}.{alias.name}", node.lineno, lazy, node.level > 0)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imports(node, lazy=True)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, lazy or is_function)


def home(parts: tuple[str, ...], src: Path) -> tuple[str, str]:
    """(layer, name) of a path below src: ("part", "steering"), ("command", "chat"), ("models", "models")."""
    name = parts[0].removesuffix(".py")
    if name in ("common", "ops", "models"):
        return name, name
    return ("part" if (src / name).is_dir() else "command"), name


def violations(root: Path) -> list[str]:
    """`file:line: what` for each import that the design does not allow, below root/src."""
    src = root / "src"
    found = []
    for path in sorted(src.rglob("*.py")):
        relative = path.relative_to(src)
        if path.name == "__init__.py":
            if path.stat().st_size:
                found.append(f"{relative}: not empty")
            continue
        for item in imports_of(path.read_text(encoding="utf-8")):
            complaint = _complaint(relative, item, src)
            if complaint:
                found.append(f"{relative}:{item.line}: imports {item.module}, {complaint}")
    return found


def _complaint(path: Path, item: Import, src: Path) -> str | None:
    layer, name = home(path.parts, src)
    if item.relative:
        return "a relative import"
    top, *rest = item.module.split(".")
    if top in ("tests", "scripts", "hpc"):
        return "which nothing imports"
    if top == "src":
        return _arrow_complaint(layer, name, tuple(rest), item.lazy, path, src)
    return _library_complaint(layer, name, top, item.lazy, path)


def _arrow_complaint(layer: str, name: str, rest: tuple[str, ...], lazy: bool, path: Path, src: Path) -> str | None:
    if not rest:
        return "which names no module"
    target, target_name = home(rest, src)
    if (target, target_name) == (layer, name):
        return None
    if target not in BELOW[layer]:
        return f"an arrow from {layer} {name} to {target} {target_name}"
    is_settings = target == "part" and rest[1:2] == ("settings",)
    if layer == "command" and not lazy and target != "common" and not is_settings:
        return "which a command imports inside functions only"
    if path.name == "settings.py" and layer == "part" and not lazy and target != "common":
        return "which the settings of a part import inside functions only"
    return None


def _library_complaint(layer: str, name: str, top: str, lazy: bool, path: Path) -> str | None:
    if top in MODEL_LIBRARIES and name not in MODEL_LIBRARY_HOMES:
        return f"which only {', '.join(sorted(MODEL_LIBRARY_HOMES))} may"
    if top == "vllm" and not (layer == "models" and path.name.startswith("vllm_")):
        return "which only models/vllm_*.py may"
    if layer == "ops" and top not in ALL_OPS:
        return "which is none of torch, numpy, scipy, pydantic and the standard library"
    if layer == "common" and not lazy and top not in EAGER_COMMON:
        return "which common imports inside functions only"
    is_parsed_first = layer == "command" or (layer == "part" and path.name == "settings.py")
    if is_parsed_first and not lazy and top not in EAGER_COMMAND:
        return "which is imported before the arguments are parsed"
    return None


def test_the_tree_keeps_the_layers() -> None:
    assert violations(ROOT) == []


PLANTED = [
    ("common/files.py", "from src.models import types"),
    ("common/files.py", "def f():\n    from src.ops import metrics"),
    ("common/files.py", "def f():\n    def g():\n        import src.personas.tasks"),
    ("common/files.py", "import torch"),
    ("common/files.py", "class A:\n    import openai"),
    ("common/files.py", "try:\n    import inspect_ai\nexcept ImportError:\n    pass"),
    ("common/files.py", "def f():\n    import transformers"),
    ("common/files.py", "from . import jsonl"),
    ("common/files.py", "def f():\n    from tests import tiny_models"),
    ("ops/metrics.py", "from src.common import files"),
    ("ops/metrics.py", "def f():\n    import pandas"),
    ("models/types.py", "from src.personas import tasks"),
    ("models/types.py", "def f():\n    import src.view"),
    ("models/types.py", "import vllm"),
    ("personas/tasks.py", "from src.steering import x"),
    ("personas/tasks.py", "def f():\n    from src.run_personas import main"),
    ("personas/tasks.py", "def f():\n    import peft"),
    ("personas/settings.py", "import src.models.types"),
    ("personas/settings.py", "import numpy"),
    ("view.py", "from src.merge_shards import main"),
    ("view.py", "from src import models"),
    ("view.py", "import src.personas.tasks"),
    ("view.py", "import numpy"),
    ("view.py", "def f():\n    import transformers.models"),
    ("view.py", "async def f():\n    from vllm import LLM"),
    ("common/__init__.py", "X = 1"),
]
ALLOWED = [
    ("common/files.py", "def f():\n    import torch\n    import openai"),
    ("common/files.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ("ops/metrics.py", "import scipy.stats\nfrom src.ops import sampling"),
    ("models/types.py", "import transformers\nfrom src.common import files\nfrom src.ops import metrics"),
    ("models/vllm_engine.py", "import vllm"),
    ("personas/tasks.py", "from src.models import types\nimport src.personas.rows\nimport rich"),
    ("view.py", "import simple_parsing\nfrom src.personas.settings import X\ndef f():\n    import src.models.types"),
    ("training/lora.py", "import peft, trl"),
]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src" / "steering").mkdir(exist_ok=True)
    return tmp_path


@pytest.mark.parametrize(("file", "code"), PLANTED)
def test_a_planted_import_is_found(copy: Path, file: str, code: str) -> None:
    before = violations(copy)
    _plant(copy, file, code)
    assert len(violations(copy)) == len(before) + 1


@pytest.mark.parametrize(("file", "code"), ALLOWED)
def test_an_allowed_import_is_not_found(copy: Path, file: str, code: str) -> None:
    before = violations(copy)
    _plant(copy, file, code)
    assert violations(copy) == before


def _plant(root: Path, file: str, code: str) -> None:
    path = root / "src" / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        handle.write(f"\n{code}\n")
