import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub_server import COMMIT, hub_server


@pytest.fixture(scope="module")
def hub(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_folder, root / "someone" / "tiny")
    (root / "someone" / "tiny" / "pytorch_model.bin").write_bytes(b"a pickle")
    (root / "someone" / "locked").mkdir()
    (root / "someone" / "locked" / "GATED").touch()
    (root / "someone" / "pickled").mkdir()
    (root / "someone" / "pickled" / "pytorch_model.bin").write_bytes(b"a pickle")
    with hub_server(root) as address:
        yield address


@pytest.fixture()
def environment(hub: str, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub, "TILLER_CACHE_DIR": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}


def test_a_model_is_fetched_described_and_loads(
    environment: dict, tiny_folder: Path, tmp_path: Path, run_module: Callable
) -> None:
    words = ["--model_id", "someone/tiny", "--output_dir", str(tmp_path / "model")]
    done = run_module("download_model", *words, **environment)
    assert done.returncode == 0, done.stderr
    assert "MB  model.safetensors" in done.stdout and "GB free" in done.stdout
    fetched = tmp_path / "model"
    assert (fetched / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
    assert not (fetched / "pytorch_model.bin").exists()
    card = json.loads((fetched / "download.json").read_text())
    assert card["commit"] == COMMIT and card["licence"] == "mit"
    assert card["files"]["model.safetensors"]["bytes"] == (tiny_folder / "model.safetensors").stat().st_size
    again = run_module("download_model", *words, **environment)
    assert again.returncode == 0 and ", 0.0 MB of it there" not in again.stdout


@pytest.mark.slow
def test_a_hub_id_is_a_model_reference(environment: dict, tmp_path: Path, run_module: Callable) -> None:
    (tmp_path / "q.json").write_text('["Hi"]')
    (tmp_path / "p.json").write_text('[{"persona": "cat", "category": "animal", "article": "a"}]')
    done = run_module(
        "run_personas", "--prompts_json", str(tmp_path / "q.json"), "--personae_json", str(tmp_path / "p.json"),
        "--model_id", "someone/tiny", "--output_dir", str(tmp_path / "run"), "--max_tokens", "2", **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").rglob("model.safetensors"))


def test_describe_only_fetches_nothing(environment: dict, tmp_path: Path, run_module: Callable) -> None:
    words = ["--model_id", "someone/tiny", "--output_dir", str(tmp_path / "model"), "--describe_only"]
    done = run_module("download_model", *words, **environment)
    assert done.returncode == 0 and "model.safetensors" in done.stdout
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "model_id, more, words",
    [
        ("someone/locked", [], ["gated", "HF_TOKEN"]),
        ("someone/nothing", [], ["no such model", "HF_TOKEN"]),
        ("someone/tiny", ["--revision", "v9"], ["v9", "--revision"]),
        ("someone/pickled", [], ["no safetensors"]),
        ("not a name", [], ["not a hub id"]),
    ],
)
def test_what_cannot_be_had_is_said_with_the_remedy(environment, tmp_path, run_module, model_id, more, words) -> None:
    done = run_module(
        "download_model", "--model_id", model_id, "--output_dir", str(tmp_path / "model"), *more, **environment
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert model_id in done.stderr and all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("command", ["download_model", pytest.param("run_personas", marks=pytest.mark.slow)])
def test_an_unreachable_hub_says_what_to_do(environment, tmp_path, run_module, command) -> None:
    (tmp_path / "q.json").write_text('["Hi"]')
    (tmp_path / "p.json").write_text('[{"persona": "cat", "category": "animal", "article": "a"}]')
    inputs = ["--prompts_json", str(tmp_path / "q.json"), "--personae_json", str(tmp_path / "p.json")]
    done = run_module(
        command, "--model_id", "someone/tiny", "--output_dir", str(tmp_path / "x"),
        *(inputs if command == "run_personas" else []), **{**environment, "HF_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().split("\n")[-1]
    assert "src.download_model" in last and "bundled:smollm2-135m" in last
