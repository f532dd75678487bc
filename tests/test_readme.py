"""What the README says: every command parses, every file of the tree is there and every command has its line."""

import importlib
import re
import shlex
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from src.common.cli import parse_config
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").strip().split("\n")]
COMMANDS = [line.split("uv run -m src.")[1] for line in LINES if "uv run -m src." in line]


def config_class(module: str) -> type:
    """The config that a command's module defines."""
    found = [
        value
        for name, value in vars(importlib.import_module(module)).items()
        if name.endswith("Config") and is_dataclass(value) and value.__module__ == module
    ]
    assert len(found) == 1, f"{module} defines {found}"
    return found[0]


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line[:40])
def test_every_command_of_the_readme_parses(line: str) -> None:
    name, *words = shlex.split(line)
    config = parse_config(config_class(f"src.{name}"), words)
    for value in vars(config).values():
        if isinstance(value, str | Path) and str(value).startswith("data/personas"):
            assert (ROOT / value).exists(), value


def test_every_command_has_an_example_and_a_line_in_the_tree() -> None:
    commands = {path.stem for path in (ROOT / "src").glob("*.py")} - {"__init__"}
    assert {line.split()[0] for line in COMMANDS} == commands
    tree = re.findall(r"^(\S+) {2,}\S", README.split("## Tree")[1], flags=re.MULTILINE)
    assert {f"src/{name}.py" for name in commands} <= set(tree)
    assert all((ROOT / path).exists() for path in tree)
    folders = {f"src/{p.name}/" for p in (ROOT / "src").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= set(tree)


def test_the_set_up_commands_are_the_ones_that_are_tested() -> None:
    assert len(LINES) >= 2 and LINES[0].startswith("pip install uv && uv run -m src.run_personas")
    assert LINES[1] == "uv run --extra cpu -m pytest tests/"
    assert LINES[1] in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_first_command_ends_with_a_table_and_a_path(tmp_path: Path, run_module: Callable) -> None:
    name, *words = shlex.split(COMMANDS[0])
    words[words.index("--output_dir") + 1] = str(tmp_path / "first")
    done = run_module(name, *words)
    assert done.returncode == 0, done.stderr
    assert (
        "Token uncertainty by persona" in done.stdout and "Hamlet" in (tmp_path / "first" / "results.jsonl").read_text()
    )
    assert f"wrote {tmp_path / 'first' / 'results.jsonl'}" in done.stdout
