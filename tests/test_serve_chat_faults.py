"""Everything that can be wrong with a request to the chat server: the right status, and the server lives."""

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from src.common.directions_file import write_directions
from src.common.model_config import ModelSettings
from src.models.language_model import LanguageModel
from tests.chat_server import CHAT, QUESTION, Served, body_of, serving
from tests.steering_specs import some_directions, write_tiny_directions

NAN = float("nan")
ENTRY = {"directions_path": "one", "layers": "0", "op": "add"}
FAULTS: dict[str, tuple[Any, int, str]] = {
    "a misspelt field": (body_of(sterring=["one:0:6"]), 400, "nearest is steering"),
    "what the engines lack": (body_of(temperature=1, top_p=0.5), 400, "top_p"),
    "tools": (body_of(tools=[{"type": "function"}]), 400, "tools"),
    "logprobs": (body_of(logprobs=True), 400, "logprobs"),
    "none of the logprobs": (body_of(logprobs=0), 400, "logprobs"),
    "another model": (body_of(model="gpt-5"), 404, "gpt-5"),
    "no model": ({"messages": QUESTION}, 400, "model"),
    "a number as model": (body_of(model=3), 400, "model"),
    "no messages": ({"model": "tiny"}, 400, "messages"),
    "empty messages": (body_of(messages=[]), 400, "messages"),
    "messages as a text": (body_of(messages="x"), 400, "messages"),
    "two of the user's turns": (body_of(messages=QUESTION * 2), 400, "in turn"),
    "the assistant last": (body_of(messages=[*QUESTION, {"role": "assistant", "content": "I"}]), 400, "in turn"),
    "another role": (body_of(messages=[{"role": "wizard", "content": "x"}]), 400, "role"),
    "an image": (body_of(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages"),
    "temperature below 0": (body_of(temperature=-1), 400, "temperature"),
    "temperature as a text": (body_of(temperature="0"), 400, "temperature"),
    "no tokens": (body_of(max_tokens=0), 400, "max_tokens"),
    "a share of a token": (body_of(max_tokens=1.5), 400, "max_tokens"),
    "too many choices": (body_of(n=1000), 400, "n"),
    "a seed below 0": (body_of(seed=-1), 400, "seed"),
    "a huge seed": (body_of(seed=2**64), 400, "seed"),
    "an empty stop": (body_of(stop=""), 400, "stop"),
    "options of streams alone": (body_of(stream_options={"include_usage": True}), 400, "stream_options"),
    "unknown directions": (body_of(steering=["ome:0:6"]), 404, "perhaps 'one'"),
    "a path as a name": (body_of(steering=["/etc/passwd:0:6"]), 404, "/etc/passwd"),
    "a layer out of range": (body_of(steering=["one:7:6"]), 400, "0 to 1"),
    "no coefficient": (body_of(steering=["one:0"]), 400, "NAME:LAYERS:COEFFICIENT"),
    "a coefficient that is NaN": (body_of(steering=["one:0:nan"]), 400, "finite"),
    "an infinite coefficient": (body_of(steering=["one:0:1e999"]), 400, "finite"),
    "steering as a text": (body_of(steering="one:0:6"), 400, "steering"),
    "steering as a number": (body_of(steering=[3]), 400, "steering"),
    "an unknown operation": (body_of(steering=[{**ENTRY, "op": "ad"}]), 400, "'add'"),
    "an unknown field of an entry": (
        body_of(steering=[{**ENTRY, "coeficient": 1}]), 400, "coefficient"),
    "a condition on unknown directions": (
        body_of(steering=[{**ENTRY, "coefficient": 1, "when": {"directions_path": "../x", "above": 1}}]), 404, "../x"),
    "an empty persona": (body_of(persona=" "), 400, "persona"),
    "a persona as a number": (body_of(persona=3), 400, "persona"),
    "states of a layer that is not there": (body_of(capture={"layers": "9"}), 400, "layer 9"),
    "states of no layer": (body_of(capture={"layers": "x"}), 400, "capture"),
    "states onto unknown directions": (body_of(capture={"layers": "0", "directions": ["x"]}), 404, "'x'"),
    "states elsewhere than directions": (
        body_of(capture={"layers": "0", "hook_point": "mlp_out", "directions": ["one"]}), 400, "resid_post"),
    "states at no point": (body_of(capture={"layers": "0", "hook_point": "soul"}), 400, "soul"),
    "states of an answer that is cut": (body_of(capture={"layers": "0"}, stop="x"), 400, "stop"),
    "a prompt that fills the context": (
        body_of(messages=[{"role": "user", "content": "word " * 600}]), 400, "context"),
    "a list": ([1], 400, ""),
    "null": (None, 400, ""),
}  # fmt: skip


STREAMED = [
    (name, True) for name, (body, _, _) in FAULTS.items() if isinstance(body, dict) and "stream_options" not in body
]


@pytest.mark.parametrize(("name", "stream"), [*((name, False) for name in FAULTS), *STREAMED])
def test_what_is_wrong_is_answered_with_its_status(served: Served, name: str, stream: bool) -> None:
    body, status, word = FAULTS[name]
    content = json.dumps(body | {"stream": True} if stream else body).encode()
    response = served.client.post(CHAT, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"}), error
    assert word in error["message"] and error["message"].count("\n") == 0


RAW = [
    (b'{"model": "tiny", "messages": [', 400), (b"", 400), (b"\xff\xfe\x00", 400), (b'{"model": "\xc3\x28"}', 400),
    (b"[" * 100_000, 400), (b'{"model": "tiny", "temperature": NaN}', 400), (b'{"a": ' + b"9" * 10_000 + b"}", 400),
    (json.dumps(body_of(steering=[{**ENTRY, "coefficient": NAN}])).encode(), 400),
    (json.dumps(body_of(messages=[{"role": "user", "content": "\ud800"}])).encode(), 400), (b"x" * 17_000_000, 413),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "status"), RAW, ids=lambda value: str(value)[:40])
def test_bodies_that_are_no_request(served: Served, raw: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    for path in (CHAT, "/v1/completions", "/v1/directions"):
        response = served.client.post(path, content=raw, headers=headers)
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("prompt", "status"),
    [("", 200), ([], 400), ([[]], 400), ([49152], 400), ([-1], 400), ([1.5], 400), (["x", 3], 400), (["x"] * 129, 400),
     (None, 400), ([1] * 512, 400)],
)  # fmt: skip
def test_prompts_of_completions(served: Served, prompt: Any, status: int) -> None:
    # Alone, the BOS token is a prompt.
    response = served.ask("/v1/completions", prompt=prompt)
    assert response.status_code == status, response.text


def test_directions_are_registered_from_their_folder_only(
    chat_model: LanguageModel, tmp_path: Path, tiny_folder: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("one", "two"):
        write_tiny_directions(folder / f"{name}.safetensors", tiny_folder, seed=len(name), method=name)
    outside = write_tiny_directions(tmp_path / "out.safetensors", tiny_folder)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "text.safetensors").write_text("no tensors")
    write_directions(folder / "other.safetensors", some_directions())
    write_directions(folder / "wide.safetensors", some_directions(d_model=8))
    with serving(chat_model, {"one": folder / "one.safetensors"}, directions_dirs=[folder]) as served:
        register = lambda name, path: served.client.post("/v1/directions", json={"name": name, "path": path})  # noqa: E731
        for path in (
            "../out.safetensors", str(outside), "link.safetensors", "/etc/passwd", "x/../../out.safetensors", "..",
            "/nowhere/at/all",
        ):  # fmt: skip
            assert register("new", path).status_code == 403, path
        for path, status in (
            ("absent.safetensors", 404), ("", 400), ("a\0b", 400), ("x" * 5000, 404), ("text.safetensors", 400),
            (".", 404), ("other.safetensors", 400), ("wide.safetensors", 400),
        ):  # fmt: skip
            assert register("new", path).status_code == status, path
        for name in ("", ".hidden", "a/b", "../x", "a:b", "x" * 65, "ü"):
            assert register(name, "two.safetensors").status_code == 400, name
        listed = lambda: [each["id"] for each in served.client.get("/v1/directions").json()["data"]]  # noqa: E731
        assert listed() == ["one"]
        assert served.ask(steering=["two:1:6"]).status_code == 404
        added = register("two", "two.safetensors")
        assert added.status_code == 200 and added.json()["layers_present"] == [0, 1]
        assert register("two", str(folder / "two.safetensors")).status_code == 200 and listed() == ["one", "two"]
        assert register("two", "one.safetensors").status_code == 409
        # What the file becomes later is nothing to those who ask by name.
        before = served.ask(steering=["two:1:6"]).json()["choices"]
        (folder / "two.safetensors").write_text("gone")
        assert served.ask(steering=["two:1:6"]).json()["choices"] == before != served.ask().json()["choices"]


def test_a_client_that_goes_ends_its_answer(served: Served) -> None:
    for stream in (True, False):
        before = served.metric("tiller_generated_tokens_total")
        body = json.dumps(body_of(max_tokens=480, stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if stream:
                assert b"200 OK" in connection.recv(4096)
            wait_for(lambda n=before: served.metric("tiller_generated_tokens_total") > n)
        wait_for(lambda: served.metric("tiller_answers_running") == 0)
        assert served.metric("tiller_generated_tokens_total") - before < 480
    assert served.ask().status_code == 200


def wait_for(holds: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def test_one_who_sends_slowly_is_cut_off_and_harms_no_other(served: Served) -> None:
    with (
        socket.create_connection(("127.0.0.1", served.port)) as slow,
        socket.create_connection(("127.0.0.1", served.port)) as slower,
    ):
        slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode())
        slow.sendall(b"Content-Length: 100\r\n\r\n{")
        slower.sendall(b"GET /health HT")
        assert served.ask().status_code == 200
        for connection in (slow, slower):
            connection.settimeout(20)
            assert b"408" in connection.recv(4096)
    assert served.ask().status_code == 200


def test_too_many_at_once_are_told_to_come_again(chat_model: LanguageModel) -> None:
    with serving(chat_model, {}, max_requests=2) as served:
        found: list[int] = []
        ask = lambda: found.append(served.ask(max_tokens=400).status_code)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for each in threads:
            each.start()
        wait_for(lambda: served.metric("tiller_answers_running") == 2)
        refused = served.ask()
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert served.ask(n=3).status_code == 429 and served.ask(stream=True).status_code == 429
        for each in threads:
            each.join()
        assert found == [200, 200] and served.ask().status_code == 200


def test_a_key_is_asked_for_except_for_the_page_and_health(chat_model: LanguageModel) -> None:
    with serving(chat_model, {}, api_key="sesame-open") as served:
        assert served.ask().status_code == 401 and served.client.get("/v1/directions").status_code == 401
        assert served.client.get("/").status_code == 200 and served.client.get("/health").json()["status"] == "ok"
        for key, status in (("sesame-shut", 401), ("sesame-open", 200)):
            served.client.headers["authorization"] = f"Bearer {key}"
            assert served.ask().status_code == status


def test_a_page_of_another_name_is_refused(served: Served) -> None:
    assert served.client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    told = served.client.post(CHAT, content=json.dumps(body_of()), headers={"content-type": "text/plain"})
    assert told.status_code == 415


@pytest.fixture(scope="module")
def described(tiny_folder: Path):
    """Of a server whose model has a short context."""
    model = LanguageModel.load(ModelSettings(model_id=str(tiny_folder)))
    model.context_length = 64
    with serving(model, {}) as running:
        yield schemathesis.openapi.from_url(f"{running.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(
    max_examples=8, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip
def test_the_server_does_what_its_description_says(case: schemathesis.Case) -> None:
    # Conversations whose turns do not alternate, and steering by unknown directions, fit and are refused.
    case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=60)
