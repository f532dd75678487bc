"""src.ask and src.judge against vLLM's own OpenAI-compatible server with the bundled model."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.ask import AskConfig
from src.ask import main as ask
from src.common.jsonl import read_jsonl
from src.judge import JudgeConfig
from src.judge import main as judge
from tests.conftest import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def url(bundled_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(bundled_folder)]
    words += ["--served-model-name", "small", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    words += ["--max-model-len", "1024", "--dtype", "float32"]
    with log.open("wb") as file:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 500
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def test_a_real_server_is_asked_and_judges(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_API_KEY1", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "dataset_path": "data/personas/prompts.json", "num_tasks": 6, "model_id": "vllm:small", "vllm_base_url": url,
        "n_repeats": 2, "temperature": 1.0, "max_tokens": 12,
    }  # fmt: skip
    ask(AskConfig(output_dir=tmp_path / "a", **settings))
    rows = [row for _, row in read_jsonl(tmp_path / "a" / "results.jsonl")]
    assert len(rows) == 12 and all(row["response"] and row["num_tokens"] <= 12 for row in rows)
    # Seeds are the repeats' indices: repeats differ, and the same seed is drawn again by a request of another client.
    assert sum(rows[i]["response"] != rows[i + 1]["response"] for i in range(0, 12, 2)) >= 4
    body = {"model": "small", "messages": [{"role": "user", "content": rows[1]["prompt"]}]}
    body |= {"temperature": 1.0, "max_tokens": 12, "seed": 1}
    assert told(url, body)["choices"][0]["message"]["content"] == rows[1]["response"]
    # Asked again, the cache answers.
    again = settings | {"output_dir": tmp_path / "b", "cache_dir": tmp_path / "a" / "cache"}
    ask(AskConfig(**again))
    costs = json.loads((tmp_path / "b" / "api-costs.jsonl").read_text())
    assert (costs["requests"], costs["from_cache"]) == (0, 12)

    judge(
        JudgeConfig(
            results_path=tmp_path / "a" / "results.jsonl", rubrics=[ROOT / "data/rubrics/coherence.txt"],
            model_id="vllm:small", vllm_base_url=url, max_tokens=8, temperature=0.0, output_dir=tmp_path / "j",
        )
    )  # fmt: skip
    judged = [row for _, row in read_jsonl(tmp_path / "j" / "judged.jsonl")]
    # This model writes a number digit by digit: a first digit must not pass for a score.
    assert len(judged) == 12
    for row in judged:
        assert row["coherence_read_from"] == "text" or row["coherence_mass"] < 0.25 or row["coherence"] >= 10


def told(url: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)
