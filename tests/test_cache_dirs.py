"""TILLER_CACHE_DIR moves every cache; without it the hub's cache stays where the user has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.common.cache_dirs import MOVED_CACHES, OWN_CACHES, cache_root

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = [*MOVED_CACHES, *OWN_CACHES, "HF_HUB_CACHE", "HF_TOKEN_PATH"]
# In a process of its own, as libraries read the variables when they are imported.
CODE = """
import json, os
from src.common.cache_dirs import use_cache_root
use_cache_root()
from huggingface_hub import constants
print(json.dumps([dict(os.environ), constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH]))
"""


def caches(home: Path, **chosen: str) -> tuple[dict[str, str], Path, Path]:
    """(environment, the hub's cache, the hub's login) after `use_cache_root` in a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "XDG_CACHE_HOME")}
    environment.pop("TILLER_CACHE_DIR", None)
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)} | chosen
    result = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    after, hub, token = json.loads(result.stdout)
    return after, Path(hub), Path(token)


def test_without_the_variable_the_hub_stays_in_place(tmp_path: Path) -> None:
    after, hub, token = caches(tmp_path)
    assert hub == tmp_path / ".cache" / "huggingface" / "hub"
    assert token == tmp_path / ".cache" / "huggingface" / "token"
    assert {name for name in VARIABLES if name in after} == set(OWN_CACHES)
    for name in OWN_CACHES:
        assert Path(after[name]).is_relative_to(tmp_path / ".cache" / "tiller")


def test_the_variable_moves_every_cache(tmp_path: Path) -> None:
    after, hub, _ = caches(tmp_path, TILLER_CACHE_DIR=str(tmp_path / "scratch"))
    assert hub.is_relative_to(tmp_path / "scratch")
    paths = [Path(after[name]) for name in (*MOVED_CACHES, *OWN_CACHES)]
    assert all(path.is_relative_to(tmp_path / "scratch") for path in paths)
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "VLLM_CACHE_ROOT"])
def test_what_the_user_set_himself_stands(tmp_path: Path, variable: str) -> None:
    own = str(tmp_path / "own")
    after, hub, _ = caches(tmp_path, TILLER_CACHE_DIR=str(tmp_path / "scratch"), **{variable: own})
    assert after[variable] == own
    expected = {"HF_HOME": tmp_path / "own" / "hub", "HF_HUB_CACHE": tmp_path / "own"}
    assert hub == expected.get(variable, tmp_path / "scratch" / "huggingface" / "hub")


def test_moving_the_cache_does_not_log_out(tmp_path: Path) -> None:
    login = tmp_path / ".cache" / "huggingface" / "token"
    login.parent.mkdir(parents=True)
    login.write_text("not a real one")
    _, _, token = caches(tmp_path, TILLER_CACHE_DIR=str(tmp_path / "scratch"))
    assert token == login


def test_the_root_is_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILLER_CACHE_DIR", "somewhere")
    assert cache_root() == Path.cwd() / "somewhere"
    monkeypatch.setenv("TILLER_CACHE_DIR", "~/somewhere")
    assert cache_root() == Path.home() / "somewhere"
