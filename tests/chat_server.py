"""A chat server of a tiny model in this process, for tests: the real application behind a real socket."""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from src.models.language_model import LanguageModel
from src.serving.chat_directions import DirectionsRegister
from src.serving.chat_server import chat_app
from src.serving.server import address_of, listen, make_server
from src.serving.settings import ChatServerSettings
from tests.conftest import ROOT, module_command

QUESTION = [{"role": "user", "content": "Who are you?"}]
CHAT = "/v1/chat/completions"


def body_of(**changed: Any) -> dict[str, Any]:
    """The body of a greedy chat completion."""
    return {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 12} | changed


def parts_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, or a whole answer as the only one."""
    lines = [line.removeprefix("data: ") for line in text.split("\n")]
    return [json.loads(line) for line in lines if line.startswith("{")]


@dataclass
class Served:
    """A server that runs."""

    url: str
    port: int
    model: LanguageModel
    register: DirectionsRegister
    config: ChatServerSettings
    client: httpx.Client

    def ask(self, path: str = CHAT, **body: Any) -> httpx.Response:
        """A request of the model's, of one question unless `messages` or `prompt` say otherwise."""
        known = body_of()
        if path != CHAT:
            del known["messages"]
        return self.client.post(path, json=known | body)

    def metric(self, name: str) -> float:
        """The sum over labels of a number of /metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


@contextlib.contextmanager
def serving(model: LanguageModel, directions: dict[str, Path], **flags: Any) -> Iterator[Served]:
    """`src.serve chat` without its process, on a free port."""
    config = ChatServerSettings(**{"model_id": "tiny", "port": 0, "request_seconds": 2.0, "stop_seconds": 20.0} | flags)
    register = DirectionsRegister(model, config.directions_dirs or [], config.allow_model_mismatch)
    for name, path in directions.items():
        register.add(name, path)
    with listen(config) as listener:
        server = make_server(chat_app(config, "tiny", model, register, config.batch_size or 8), config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        url = address_of(listener)
        try:
            with httpx.Client(base_url=url, timeout=120) as client:
                yield Served(url, listener.getsockname()[1], model, register, config, client)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def process(*words: str | Path, seconds: float = 300) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command, once it serves; yields it and its address."""
    command = module_command("serve", ["chat", *map(str, words), "--port", "0"])
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(seconds, running.kill)
    timer.start()
    try:
        said = []
        for line in running.stdout:
            said.append(line)
            if line.startswith("serving at "):
                break
        else:
            raise AssertionError("".join(said))
        url = said[-1].split()[2]
        while True:
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield running, url
    finally:
        timer.cancel()
        running.kill()
        running.wait(30)
