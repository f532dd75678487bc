"""`src.serve chat` as a process: its first words, what a signal does, and on vLLM what eight clients get at once."""

import asyncio
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chat_server import CHAT, body_of, parts_of, process
from tests.steering_specs import write_tiny_directions


def is_free(url: str) -> bool:
    with socket.socket() as some:
        some.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return some.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_was_asked_be_answered(tiny_folder: Path, chat_directions: Path, number: int) -> None:
    named = f"one={chat_directions / 'one.safetensors'}"
    with process("--model_id", tiny_folder, "--model_name", "tiny", "--directions", named) as (running, url):
        body = body_of(stream=True, max_tokens=300, steering=["one:0:4"], uncertainty=True)
        with httpx.Client(base_url=url, timeout=60) as client, client.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            os.kill(running.pid, number)
            # SLURM may send it twice.
            os.kill(running.pid, signal.SIGTERM)
            text = "\n".join([first, *lines])
        parts = parts_of(text)
        assert text.rstrip().endswith("data: [DONE]") and parts[-1]["choices"][0]["finish_reason"] in ("length", "stop")
        tokens = [each for part in parts for each in part["choices"][0].get("uncertainty", [])]
        assert len(tokens) == 300 or parts[-1]["choices"][0]["finish_reason"] == "stop"
        code = running.wait(60)
        assert code == (0 if number == signal.SIGTERM else 130), running.stdout.read()
        assert is_free(url)


WRONG = [
    (["--model_id", "nowhere/at/all"], "nowhere"),
    (["--directions", "one"], "NAME=FILE"),
    (["--directions", "one=absent.safetensors"], "absent.safetensors"),
    (["--directions", "one=a", "one=b"], "taken"),
    (["--directions_dirs", "absent"], "absent"),
    (["--host", "0.0.0.0"], "api_key"),
    (["--chat_template", "absent.jinja"], "absent.jinja"),
    (["--compiled", "--backend", "hf"], "compiled"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_what_is_wrong_is_said_at_once(tiny_folder: Path, words: list[str], said: str) -> None:
    from src.common.cli import parse_config
    from src.common.errors import InputError
    from src.serve import ServeConfig, main

    model = [] if "--model_id" in words else ["--model_id", str(tiny_folder)]
    with pytest.raises(InputError, match=said):
        main(parse_config(ServeConfig, ["chat", *model, "--port", "0", *words]))


def test_a_port_that_is_taken_is_said(tiny_folder: Path) -> None:
    from src.common.cli import parse_config
    from src.common.errors import InputError
    from src.serve import ServeConfig, main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match=port):
            main(parse_config(ServeConfig, ["chat", "--model_id", str(tiny_folder), "--port", port]))


@pytest.mark.vllm
@pytest.mark.slow
def test_on_vllm_eight_clients_at_once_get_what_each_gets_alone(small_folder: Path, tmp_path: Path) -> None:
    path = write_tiny_directions(tmp_path / "one.safetensors", small_folder)
    words = ["--model_id", small_folder, "--model_name", "tiny", "--directions", f"one={path}", "--backend", "vllm"]
    bodies = [
        body_of(steering=[f"one:{i % 2}:{4 * i}"] if i else [], max_tokens=16 + i, uncertainty=True, stream=i % 2 == 1,
                temperature=0.8 if i > 5 else 0, seed=i)
        for i in range(8)
    ]  # fmt: skip

    async def tokens(client: httpx.AsyncClient, body: dict[str, Any]) -> list[int]:
        parts = parts_of((await client.post(CHAT, json=body)).text)
        found = [each for part in parts for choice in part["choices"] for each in choice.get("uncertainty", [])]
        return [each["token_id"] for each in found]

    async def ask(url: str) -> tuple[list, list]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            alone = [await tokens(client, body) for body in bodies]
            return alone, list(await asyncio.gather(*(tokens(client, body) for body in bodies * 2)))

    with process(*words, "--dtype", "float32", "--kv_cache_gib", "0.25", "--max_model_len", "256") as (running, url):
        alone, together = asyncio.run(ask(url))
        assert together == alone * 2 and len({json.dumps(each) for each in alone}) == 8
        kept = httpx.post(f"{url}{CHAT}", json=body_of(capture={"layers": "all", "directions": ["one"]}), timeout=60)
        rows = kept.json()["choices"][0]["capture"]
        assert [row["layer"] for row in rows] == [0, 1] and all(row["mean_norm"] > 0 for row in rows)
        with httpx.stream("POST", f"{url}{CHAT}", json=body_of(max_tokens=200, stream=True), timeout=60) as response:
            next(response.iter_lines())
        wrong = httpx.post(f"{url}{CHAT}", json=body_of(steering=["one:0:nan"]), timeout=60)
        assert wrong.status_code == 400
        running.terminate()
        assert running.wait(60) == 0 and is_free(url)
