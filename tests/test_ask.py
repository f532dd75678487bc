"""src.ask against servers on loopback that fail, are stopped, or are asked twice."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.ask import AskConfig, main
from src.common.errors import CheckFailed, InputError, StopRequested
from src.common.jsonl import read_jsonl
from tests.conftest import ROOT, module_command
from tests.fault_server import KEY, FaultServer, a_fifth, serve

pytestmark = pytest.mark.usefixtures("planted_key")


def dataset(folder: Path, rows: list[Any]) -> str:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(folder: Path, n: int) -> str:
    return dataset(folder, [{"id": f"q{i}", "prompt": f"question {i}"} for i in range(n)])


def config(folder: Path, server: FaultServer, path: str, **settings: Any) -> AskConfig:
    values = {"model_id": "openai:m", "openai_base_url": server.url, "output_dir": folder / "run"}
    return AskConfig(**(values | {"dataset_path": path} | settings))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(path, in_progress=True)] if path.exists() else []


def test_a_row_an_answer_in_the_order_of_the_questions(tmp_path: Path, server: FaultServer) -> None:
    path = dataset(
        tmp_path,
        [
            {"id": "b", "q": "eins\u2028zwei", "prompt": "not this"},
            {"q": "…"},
            {"id": 7, "q": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
                            {"role": "user", "content": "last"}]},
        ],
    )  # fmt: skip
    main(config(tmp_path, server, path, question_field="q", n_repeats=2, system_prompt="S", temperature=0.5))
    rows = rows_of(tmp_path / "run" / "results.jsonl")
    assert [(row["prompt_id"], row["rep_idx"], row["seed"]) for row in rows] == [
        (name, rep, rep) for name in ("b", "1", "7") for rep in range(2)
    ]
    assert len({row["id"] for row in rows}) == 6
    assert rows[0]["response"] == "server on eins\u2028zwei with 0" and rows[5]["response"] == "server on last with 1"
    assert [request["messages"][0] for request in server.requests] == [{"role": "system", "content": "S"}] * 6
    assert {request["temperature"] for request in server.requests} == {0.5}
    assert (rows[0]["num_tokens"], rows[0]["num_prompt_tokens"], rows[0]["answered_by"]) == (5, 7, "m-dated")
    assert (tmp_path / "run" / "DONE").exists() and not (tmp_path / "run" / "failures.jsonl").exists()


@pytest.mark.parametrize("batch_api", [False, True])
def test_repeats_without_a_seed_are_draws_of_their_own(tmp_path: Path, server: FaultServer, batch_api: bool) -> None:
    draws = iter(range(100))
    server.completion = lambda body: {"content": f"draw {next(draws)}"}
    settings = {"n_repeats": 3, "send_seed": False, "batch_api": batch_api, "poll_seconds": 0.05}
    path = questions(tmp_path, 2)
    main(config(tmp_path, server, path, **settings))
    rows = rows_of(tmp_path / "run" / "results.jsonl")
    assert len({row["response"] for row in rows}) == 6 and {row["seed"] for row in rows} == {None}
    assert len(server.requests) == 6 and not [each for each in server.requests if {"seed", "repeat"} & set(each)]
    # Each draw has its place in the cache.
    main(config(tmp_path, server, path, output_dir=tmp_path / "b", cache_dir=tmp_path / "run" / "cache", **settings))
    assert rows_of(tmp_path / "b" / "results.jsonl") == rows and len(server.requests) == 6


def check_all_told(folder: Path, n: int) -> tuple[set[str], set[str]]:
    """The ids that have an answer and those that have none: together all, and none twice."""
    answered = [row["prompt_id"] for row in rows_of(folder / "results.jsonl")]
    failed = [row["question"].replace("question ", "q") for row in rows_of(folder / "failures.jsonl")]
    assert sorted(answered + failed) == sorted(f"q{i}" for i in range(n))
    return set(answered), set(failed)


def test_a_fifth_of_faults_loses_no_question_and_asks_none_twice(tmp_path: Path) -> None:
    n = 150
    with serve(a_fifth) as server:
        own = config(tmp_path, server, questions(tmp_path, n), max_attempts=2, request_timeout=15.0)
        with pytest.raises(CheckFailed, match=rf"of {n} questions have no answer"):
            main(own)
        faulty = {f"q{i}" for i in range(n) if a_fifth(f"question {i}", 1)}
        hopeless = {f"q{i}" for i in range(n) if a_fifth(f"question {i}", 2)}
        assert len(faulty) > 20 and hopeless
        answered, failed = check_all_told(tmp_path / "run", n)
        assert failed == hopeless and answered | failed == {f"q{i}" for i in range(n)}
        # One request each, and one more for each fault.
        assert server.attempts == Counter({f"question {i}": 1 + (f"q{i}" in faulty) for i in range(n)})
        assert not (tmp_path / "run" / "DONE").exists()

        # The same command asks those again and no other.
        before = len(server.requests)
        server.fault = lambda question, attempt: None
        main(own)
        assert check_all_told(tmp_path / "run", n) == ({f"q{i}" for i in range(n)}, set())
        assert len(server.requests) - before == len(hopeless)

        # Another run with the same cache asks nothing.
        main(
            config(tmp_path, server, own.dataset_path, output_dir=tmp_path / "b", cache_dir=tmp_path / "run" / "cache")
        )
        assert len(server.requests) - before == len(hopeless)
        told = [{k: row[k] for k in ("id", "response")} for row in rows_of(tmp_path / "b" / "results.jsonl")]
        assert told == [{k: row[k] for k in ("id", "response")} for row in rows_of(tmp_path / "run" / "results.jsonl")]


def test_no_key_in_any_file_or_message(
    tmp_path: Path, server: FaultServer, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server.fault = lambda question, attempt: "echo" if question == "question 1" else None
    own = config(tmp_path, server, questions(tmp_path, 3), enable_prompt_history=True, openai_num_threads=1)
    with pytest.raises(CheckFailed) as failure:
        main(own)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    said = capsys.readouterr()
    texts = [str(failure.value), said.out, said.err, *(record.getMessage() for record in caplog.records)]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"failures.jsonl", "answers.sqlite", "provenance.json"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert not [text for text in texts if KEY in text]
    assert "<withheld>" in (tmp_path / "run" / "failures.jsonl").read_text()


def test_a_key_from_env_file_does_not_win_over_the_environment(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("OPENAI_API_KEY=sk-from-the-file\nMY_TAG=sk-of-the-tag-1\n")
    path = questions(tmp_path, 1)
    main(config(tmp_path, server, path))
    main(config(tmp_path, server, path, output_dir=tmp_path / "b", openai_tag="MY_TAG"))
    monkeypatch.delenv("OPENAI_API_KEY")
    main(config(tmp_path, server, path, output_dir=tmp_path / "c"))
    assert [headers["authorization"] for headers in server.headers] == [
        f"Bearer {KEY}", "Bearer sk-of-the-tag-1", "Bearer sk-from-the-file"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_id": "nobody", "openai_base_url": None}, "no provider named"),
        ({"model_id": "openai:"}, "no model after the prefix"),
        ({"model_id": "together:m"}, "no key for together: set TOGETHER_API_KEY"),
        ({"model_id": "anthropic:m", "temperature": 0.0}, "temperature: anthropic takes no such parameter"),
        ({"openai_base_url": "http://user:pass@host/v1"}, "holds a user, a password"),
        ({"openai_base_url": "localhost:8000"}, "expected http://"),
        ({"openai_tag": "sk-abc-def"}, "no name of a variable"),
        ({"n_repeats": 0}, "--n_repeats 0"),
        ({"request_timeout": float("nan")}, "--request_timeout nan"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"question_field": "promt"}, r"questions.jsonl:1: no column 'promt', perhaps \"prompt\""),
        ({"batch_api": True, "model_id": "vllm:m"}, "no batch endpoint"),
        ({"prices_path": Path("nowhere.json")}, "nowhere.json"),
        ({"use_redis": True}, "only --api_backend safetytooling"),
    ],
)
def test_what_is_wrong_is_told(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], told: str
) -> None:
    monkeypatch.delenv("TOGETHER_API_KEY", raising=False)
    with pytest.raises(InputError, match=told) as error:
        main(config(tmp_path, server, questions(tmp_path, 2), **settings))
    assert "\n" not in str(error.value) and "sk-abc" not in str(error.value) and "pass@" not in str(error.value)
    assert not server.requests


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "no rows in it"),
        ([{"prompt": ""}], ":1: prompt is empty"),
        ([{"prompt": "a"}, {"prompt": None}], ":2: prompt is null"),
        ([{"id": "a", "prompt": "a"}, {"id": "a", "prompt": "b"}], ":2: id 'a' is already at"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], "role assistant"),
        ([{"messages": []}], "messages is the list"),
        ([["a"]], "a JSON list"),
    ],
)
def test_a_wrong_dataset_is_told(tmp_path: Path, server: FaultServer, rows: list[Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        main(config(tmp_path, server, dataset(tmp_path, rows)))


def test_another_server_in_the_same_folder_is_refused(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = questions(tmp_path, 1)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    main(config(tmp_path, server, path, openai_base_url=None))
    with serve() as other:
        monkeypatch.setenv("OPENAI_BASE_URL", other.url)
        with pytest.raises(InputError, match="base_url was"):
            main(config(tmp_path, server, path, openai_base_url=None))


def test_a_wrong_server_may_be_put_right_in_the_same_folder(tmp_path: Path, server: FaultServer) -> None:
    path = questions(tmp_path, 2)
    nobody = "http://127.0.0.1:9/v1"
    with pytest.raises(CheckFailed, match=re.escape(f"2 of 2 questions have no answer ({tmp_path}")) as failure:
        main(config(tmp_path, server, path, openai_base_url=nobody, max_attempts=1))
    assert nobody in str(failure.value)
    main(config(tmp_path, server, path))
    assert check_all_told(tmp_path / "run", 2)[1] == set()


def test_a_kill_loses_no_answer_and_doubles_none(tmp_path: Path, server: FaultServer) -> None:
    server.delay = 0.1
    n = 60
    words = [
        *("--dataset_path", questions(tmp_path, n), "--model_id", "openai:m", "--openai_base_url", server.url),
        *("--openai_num_threads", "2", "--output_dir", str(tmp_path / "run")),
    ]
    results = tmp_path / "run" / "results.jsonl"
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        there = len(rows_of(results))
        process = subprocess.Popen(
            module_command("ask", words), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
        )
        deadline = time.monotonic() + 120
        while results.read_bytes().count(b"\n") < there + 8 if results.exists() else True:
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=60)
        assert process.returncode == code, said
        if code == 75:
            assert b"stopped by SIGTERM" in said[1] and b"Traceback" not in said[1]
    main(config(tmp_path, server, str(tmp_path / "questions.jsonl"), openai_num_threads=2))
    assert check_all_told(tmp_path / "run", n) == ({f"q{i}" for i in range(n)}, set())
    # What was on its way at a kill was asked again, nothing else: at most two at a time.
    assert n <= len(server.requests) <= n + 4


def test_cached_answers_need_no_client(tmp_path: Path, server: FaultServer, run_module: Callable) -> None:
    n = 200
    path = questions(tmp_path, n)
    main(config(tmp_path, server, path))
    words = [
        *("--dataset_path", path, "--model_id", "openai:m", "--openai_base_url", server.url),
        *("--cache_dir", str(tmp_path / "run" / "cache"), "--output_dir", str(tmp_path / "again")),
    ]
    done = run_module("ask", *words, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.split("|")[-1].strip() for line in done.stderr.split("\n") if line.startswith("import time")}
    # The seconds are in the research log; what they come of is the property.
    assert "sqlite3" in imported and not imported & {"inspect_ai", "openai", "anthropic", "torch"}
    assert len(server.requests) == n and len(rows_of(tmp_path / "again" / "results.jsonl")) == n
    assert f"{n} answers from the cache" in done.stderr


def test_a_cache_that_is_no_database_is_told(tmp_path: Path, server: FaultServer) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "answers.sqlite").write_bytes(b"no database at all, but long enough to be looked at" * 40)
    with pytest.raises(InputError, match=r"answers\.sqlite"):
        main(config(tmp_path, server, questions(tmp_path, 1), cache_dir=tmp_path / "c"))
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / "c" / "answers.sqlite").execute("SELECT 1 FROM answers")


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_batches_give_the_answers_of_single_calls(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url.removesuffix("/v1"))
    path = questions(tmp_path, 5)
    settings = {"model_id": f"{provider}:m", "max_tokens": 9, "system_prompt": "S", "n_repeats": 2}
    main(config(tmp_path, server, path, **settings))
    single, server.requests = server.requests, []
    server.batch_looks = 1
    main(config(tmp_path, server, path, batch_api=True, poll_seconds=0.05, output_dir=tmp_path / "b", **settings))
    assert len(server.batches) == 1
    assert sorted(map(plain_body, server.requests)) == sorted(map(plain_body, single))
    assert rows_of(tmp_path / "b" / "results.jsonl") == rows_of(tmp_path / "run" / "results.jsonl")
    # What a batch answered is in the cache for single calls.
    asked = len(server.requests)
    main(config(tmp_path, server, path, output_dir=tmp_path / "c", cache_dir=tmp_path / "b" / "cache", **settings))
    assert len(server.requests) == asked


def plain_body(body: dict[str, Any]) -> str:
    """As text; single calls to Anthropic also say: no tools, no stream, and write the system message as parts."""
    body = {name: value for name, value in body.items() if name not in ("tools", "stream")}
    if isinstance(body.get("system"), list):
        body["system"] = "".join(part["text"] for part in body["system"])
    return json.dumps(body, sort_keys=True)


def run_until_a_batch_waits(own: AskConfig, server: FaultServer) -> None:
    """Runs until the last batch was looked at twice, and sends SIGTERM then."""
    before = len(server.batches)

    def stop_soon() -> None:
        while len(server.batches) == before or next(reversed(server.batches.values()))["looks"] < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_soon, daemon=True).start()
    with pytest.raises(StopRequested, match="SIGTERM"):
        main(own)


def test_a_person_says_which_of_anthropics_batches_was_sent_before_a_kill(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url.removesuffix("/v1"))
    server.batch_looks, server.clock = 10**9, -90.0
    own = config(tmp_path, server, questions(tmp_path, 2), model_id="anthropic:m", batch_api=True, poll_seconds=0.05)
    run_until_a_batch_waits(own, server)
    # As if a kill had come before the id was written.
    state = tmp_path / "run" / "batches.json"
    (entry,) = json.loads(state.read_text())
    state.write_text(json.dumps([entry | {"batch_id": None}]))
    with pytest.raises(InputError, match="perhaps msgbatch_0: write its id"):
        main(own)
    state.write_text(json.dumps([entry]))
    server.batch_looks = 0
    main(own)
    assert len(server.batches) == 1 and len(rows_of(tmp_path / "run" / "results.jsonl")) == 2


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_stopped_run_waits_for_its_batch_and_sends_no_other(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url.removesuffix("/v1"))
    server.batch_looks = 10**9
    faulty = {"question 1": "400", "question 2": "expired", "question 4": "unreadable"}
    server.fault = lambda question, attempt: faulty.get(question)
    own = config(
        tmp_path, server, questions(tmp_path, 5), model_id=f"{provider}:m", batch_api=True, poll_seconds=0.05
    )  # fmt: skip

    run_until_a_batch_waits(own, server)
    server.batch_looks = 0
    with pytest.raises(CheckFailed, match="3 of 5 questions have no answer"):
        main(own)
    assert len(server.batches) == 1
    answered, failed = check_all_told(tmp_path / "run", 5)
    assert failed == {"q1", "q2", "q4"} and answered == {"q0", "q3"}
    # The same command sends what failed once more, and nothing else.
    server.fault = lambda question, attempt: None
    main(own)
    assert len(server.batches) == 2 and check_all_told(tmp_path / "run", 5)[1] == set()
    assert Counter(json.loads(plain_body(body))["messages"][-1]["content"] for body in server.requests[5:]) == Counter(
        ["question 1", "question 2", "question 4"]
    )


def test_an_answer_that_a_smaller_run_has_no_use_for_is_kept_for_a_larger_one(
    tmp_path: Path, server: FaultServer
) -> None:
    server.batch_looks = 10**9
    path = questions(tmp_path, 3)
    some = lambda n: config(tmp_path, server, path, batch_api=True, poll_seconds=0.05, num_tasks=n)  # noqa: E731
    run_until_a_batch_waits(some(3), server)
    server.batch_looks = 0
    main(some(1))
    assert len(rows_of(tmp_path / "run" / "results.jsonl")) == 1
    main(some(3))
    assert len(rows_of(tmp_path / "run" / "results.jsonl")) == 3 and len(server.batches) == 1


def test_a_batch_that_was_sent_just_before_a_kill_is_found_by_its_tag(tmp_path: Path, server: FaultServer) -> None:
    server.batch_looks = 10**9
    path = questions(tmp_path, 2)
    words = [
        *("--dataset_path", path, "--model_id", "openai:m", "--openai_base_url", server.url, "--batch_api"),
        *("--poll_seconds", "0.05", "--output_dir", str(tmp_path / "run")),
    ]
    process = subprocess.Popen(module_command("ask", words), cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not server.batches or not next(iter(server.batches.values()))["looks"]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    # As if the kill had come before the id was written.
    state = tmp_path / "run" / "batches.json"
    (entry,) = json.loads(state.read_text())
    state.write_text(json.dumps([entry | {"batch_id": None}]))
    server.batch_looks = 0
    main(config(tmp_path, server, path, batch_api=True, poll_seconds=0.05))
    assert len(server.batches) == 1 and len(rows_of(tmp_path / "run" / "results.jsonl")) == 2
