"""
A server on loopback that speaks the protocols of OpenAI and Anthropic, batches too, and fails in the ways that servers
do. It keeps every request, so that a test can say what was sent and how often.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

KEY = "sk-planted-0123456789"
Fault = Callable[[str, int], str | None]
"""(question, attempt from 1) → the kind of fault, None for an answer."""
KINDS = ("429", "500", "hang", "broken", "not_the_protocol", "disconnect")


def no_fault(question: str, attempt: int) -> str | None:
    return None


def a_fifth(question: str, attempt: int) -> str | None:
    """Of five questions one meets a fault at its first attempt; of those one in eight at every attempt."""
    number = int(hashlib.sha256(question.encode()).hexdigest(), 16)
    if number % 5 or (attempt > 1 and number // 5 % 8):
        return None
    return KINDS[number // 40 % len(KINDS)]


def plant_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """KEY is the only key there is, and no variable names a server."""
    for name in ("OPENAI_API_KEY1", "OPENAI_BASE_URL", "OPENAI_TIMEOUT", "ANTHROPIC_BASE_URL", "VLLM_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, KEY)


class FaultServer:
    """What was asked, and the settings of the server; `url` is the base URL of the OpenAI protocol."""

    def __init__(self, fault: Fault = no_fault, name: str = "server") -> None:
        self.fault, self.name = fault, name
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.attempts: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self.delay = 0.0
        self.completion: Callable[[dict[str, Any]], dict[str, Any]] = self.plain
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.batch_looks = 0
        """Looks at a batch before it is over."""
        self.clock = 1.0
        """Seconds by which this server's clock is ahead, as it dates Anthropic's batches."""
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def questions(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]

    def plain(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a model would say: who, to what, with which seed."""
        return {"content": f"{self.name} on {body['messages'][-1]['content']} with {body.get('seed')}"}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        made = self.completion(body)
        message = {"role": "assistant", "content": made["content"]} | made.get("message", {})
        choice = {"index": 0, "message": message, "finish_reason": made.get("finish_reason", "stop")}
        if body.get("logprobs") and "logprobs" in made:
            choice["logprobs"] = {"content": made["logprobs"]}
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        return {
            "id": "c", "object": "chat.completion", "created": 1, "model": f"{body['model']}-dated",
            "choices": [choice | {"index": index} for index in range(body.get("n", 1))], "usage": usage,
        }  # fmt: skip

    def response(self, body: dict[str, Any]) -> dict[str, Any]:
        made = self.completion(body | {"messages": body["input"]})
        cut = made.get("finish_reason") == "length"
        text = {"type": "output_text", "text": made["content"], "annotations": []}
        return {
            "id": "r", "object": "response", "created_at": 1, "model": f"{body['model']}-dated", "error": None,
            "status": "incomplete" if cut else "completed", "parallel_tool_calls": False, "tool_choice": "auto",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "tools": [],
            "output": [
                {"type": "reasoning", "id": "t", "summary": [{"type": "summary_text", "text": "hm"}]},
                {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [text]},
            ],
            "usage": {"input_tokens": 7, "output_tokens": 5, "total_tokens": 12,
                      "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 1}},
        }  # fmt: skip

    def message(self, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "m", "type": "message", "role": "assistant", "model": body["model"], "stop_reason": "end_turn",
            "stop_sequence": None, "content": [{"type": "text", "text": self.completion(body)["content"]}],
            "usage": {"input_tokens": 7, "output_tokens": 5},
        }  # fmt: skip

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        question = _text((body.get("messages") or body["input"])[-1]["content"])
        self.attempts[question] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.delay)
            fault = self.fault(question, self.attempts[question])
            if fault is not None:
                return await self.fail(fault, request)
            makers = {"completions": self.chat, "responses": self.response, "messages": self.message}
            return JSONResponse(makers[request.url.path.rpartition("/")[2]](body))
        finally:
            self.at_once -= 1

    async def fail(self, kind: str, request: Request) -> Response:
        if kind == "429":
            return JSONResponse({"error": {"message": "slow down"}}, 429, {"Retry-After": "1"})
        if kind == "hang":
            await asyncio.sleep(60)
        if kind == "broken":
            return Response(b'{"choices": [{"mess', media_type="application/json")
        if kind == "broken_off":
            choice = {"index": 0, "message": {"role": "assistant", "content": "half an"}, "finish_reason": "error"}
            return JSONResponse({"choices": [choice | {"error": {"code": 502, "message": "the model's server died"}}]})
        if kind == "not_the_protocol":
            return JSONResponse({"choices": "none", "detail": "the wrong shape"})
        if kind == "disconnect":
            return Response(b"{", headers={"content-length": "1000"}, media_type="application/json")
        if kind == "echo":
            told = request.headers.get("authorization", "") + request.headers.get("x-api-key", "")
            return JSONResponse({"error": {"message": f"your key {told} is unknown"}}, 401)
        if kind == "too_long":
            error = {"message": "This model's maximum context length is 8 tokens", "code": "context_length_exceeded"}
            return JSONResponse({"error": error}, 400)
        return JSONResponse({"error": {"message": f"fault {kind}"}}, int(kind))

    async def upload(self, request: Request) -> Response:
        form = await request.form()
        name = f"file-{len(self.files)}"
        self.files[name] = await form["file"].read()
        return JSONResponse(
            {"id": name, "object": "file", "bytes": 1, "created_at": 1, "filename": "f", "purpose": "batch",
             "status": "processed"}
        )  # fmt: skip

    async def content(self, request: Request) -> Response:
        return PlainTextResponse(self.files[request.path_params["name"]])

    async def openai_batches(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"object": "list", "data": list(self.batches.values()), "has_more": False})
        body = await request.json()
        batch_id = f"batch-{len(self.batches)}"
        self.batches[batch_id] = {
            "id": batch_id, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
            "completion_window": "24h", "created_at": int(time.time()), "status": "in_progress", "looks": 0,
            "metadata": body.get("metadata"),
        }  # fmt: skip
        return JSONResponse(self.batches[batch_id])

    async def openai_batch(self, request: Request) -> Response:
        batch = self.batches[request.path_params["batch_id"]]
        batch["looks"] += 1
        if batch["looks"] > self.batch_looks and batch["status"] == "in_progress":
            rows = [json.loads(line) for line in self.files[batch["input_file_id"]].decode().splitlines()]
            good, bad = [], []
            for row in reversed(rows):  # the protocol promises no order
                self.requests.append(row["body"])
                fault = self.fault(row["body"]["messages"][-1]["content"], 1)
                if fault in (None, "unreadable"):
                    response = {"status_code": 200, "body": self.chat(row["body"]) if fault is None else {}}
                    good.append({"custom_id": row["custom_id"], "response": response, "error": None})
                elif fault != "expired":
                    response = {"status_code": 400, "body": {"error": {"message": f"fault {fault}"}}}
                    bad.append({"custom_id": row["custom_id"], "response": response, "error": None})
            for name, lines in (("output_file_id", good), ("error_file_id", bad)):
                if lines:
                    batch[name] = f"file-{len(self.files)}"
                    self.files[batch[name]] = "".join(json.dumps(line) + "\n" for line in lines).encode()
            batch["status"] = "completed"
        return JSONResponse(batch)

    async def anthropic_batches(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"data": [self._shown(b) for b in self.batches.values()], "has_more": False})
        batch_id = f"msgbatch_{len(self.batches)}"
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + self.clock))
        self.batches[batch_id] = {
            "id": batch_id, "type": "message_batch", "processing_status": "in_progress", "created_at": now,
            "expires_at": now, "looks": 0, "requests": (await request.json())["requests"],
            "request_counts": {"processing": 0, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0},
        }  # fmt: skip
        return JSONResponse(self._shown(self.batches[batch_id]))

    def _shown(self, batch: dict[str, Any]) -> dict[str, Any]:
        over = batch["looks"] > self.batch_looks
        results = f"http://127.0.0.1:{self.port}/v1/messages/batches/{batch['id']}/results" if over else None
        known = {name: value for name, value in batch.items() if name not in ("requests", "looks")}
        return known | {"processing_status": "ended" if over else "in_progress", "results_url": results}

    async def anthropic_batch(self, request: Request) -> Response:
        batch = self.batches[request.path_params["batch_id"]]
        batch["looks"] += 1
        return JSONResponse(self._shown(batch))

    async def anthropic_results(self, request: Request) -> Response:
        lines = []
        for row in reversed(self.batches[request.path_params["batch_id"]]["requests"]):
            self.requests.append(row["params"])
            fault = self.fault(row["params"]["messages"][-1]["content"], 1)
            if fault == "unreadable":
                result = {"type": "succeeded", "message": self.message(row["params"]) | {"content": None}}
            elif fault:
                error = {
                    "type": "error",
                    "error": {"type": "invalid_request_error", "message": "no"},
                    "request_id": "r",
                }
                result = {"type": "errored", "error": error}
            else:
                result = {"type": "succeeded", "message": self.message(row["params"])}
            lines.append(json.dumps({"custom_id": row["custom_id"], "result": result}) + "\n")
        return PlainTextResponse("".join(lines), media_type="application/x-jsonl")


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@contextmanager
def serve(fault: Fault = no_fault, name: str = "server") -> Iterator[FaultServer]:
    """The server in a thread of its own, at a free port, until the block ends."""
    state = FaultServer(fault, name)
    routes = [
        Route("/v1/chat/completions", state.answer, methods=["POST"]),
        Route("/v1/responses", state.answer, methods=["POST"]),
        Route("/v1/messages", state.answer, methods=["POST"]),
        Route("/v1/files", state.upload, methods=["POST"]),
        Route("/v1/files/{name}/content", state.content),
        Route("/v1/batches", state.openai_batches, methods=["GET", "POST"]),
        Route("/v1/batches/{batch_id}", state.openai_batch),
        Route("/v1/messages/batches", state.anthropic_batches, methods=["GET", "POST"]),
        Route("/v1/messages/batches/{batch_id}", state.anthropic_batch),
        Route("/v1/messages/batches/{batch_id}/results", state.anthropic_results),
    ]
    config = uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    state.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield state
    finally:
        server.should_exit = True
        thread.join()
