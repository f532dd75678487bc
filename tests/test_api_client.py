"""Asking over real HTTP: what is sent, how often, what is kept, what fails and how."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from src.common.api_client import ApiClient
from src.common.api_config import ApiConfigBase
from src.common.api_types import ApiFailure
from src.common.errors import InputError
from src.common.experiment_config import ExperimentConfigBase
from src.common.safetytooling_wrappers import api_call, ask_single_question
from tests.fault_server import KEY, FaultServer, serve

pytestmark = pytest.mark.usefixtures("planted_key")


def config(folder: Path, server: FaultServer, **settings: Any) -> ApiConfigBase:
    values = {"model_id": "openai:m", "openai_base_url": server.url, "output_dir": folder} | settings
    return ApiConfigBase(**values)


def ask(config: ExperimentConfigBase, *questions: str, model_id: str = "openai:m", **parameters: Any) -> list[Any]:
    """The answers, or the exceptions."""

    async def all_of_them() -> list[Any]:
        api = config.api
        calls = [ask_single_question(api, model_id, question, **parameters) for question in questions]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        await api.close()
        return answers

    return asyncio.run(all_of_them())


def test_only_what_the_user_set_is_sent(tmp_path: Path, server: FaultServer) -> None:
    own = config(tmp_path, server)
    assert ask(own, "a") == [["server on a with None"]]
    ask(own, "a", temperature=0.0, seed=3, max_tokens=9, system_prompt="S", top_p=None)
    user = {"role": "user", "content": "a"}
    assert server.requests == [
        {"model": "m", "messages": [user]},
        {
            **{"model": "m", "messages": [{"role": "system", "content": "S"}, user]},
            **{"temperature": 0.0, "seed": 3, "max_tokens": 9},
        },
    ]


def test_anthropic_is_sent_what_its_protocol_requires_and_no_more(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url.removesuffix("/v1"))
    own = config(tmp_path, server)
    assert ask(own, "a", model_id="anthropic:claude-x", seed=1, system_prompt="S") == [["server on a with None"]]
    (request,) = server.requests
    assert request.pop("max_tokens") > 1000
    assert request.pop("tools") == [] and request.pop("stream") is False
    assert request == {
        "model": "claude-x", "messages": [{"role": "user", "content": "a"}], "system": [{"type": "text", "text": "S"}]
    }  # fmt: skip
    # Its clients would leave a temperature out with a warning; here that is an error.
    (error,) = ask(own, "a", model_id="anthropic:claude-x", temperature=0.0)
    assert isinstance(error, InputError) and "temperature" in str(error)


def test_the_responses_api_is_asked_and_read(tmp_path: Path, server: FaultServer) -> None:
    server.completion = lambda body: {
        "content": "yes",
        "finish_reason": "length" if "max_output_tokens" in body else "stop",
    }
    own = config(tmp_path, server)

    def call(**parameters: Any) -> Any:
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
        (answer,) = asyncio.run(api_call(own.api, "openai-responses:m", messages, **parameters))
        return answer

    whole, cut = call(seed=1), call(seed=1, max_tokens=9, temperature=0.5)
    assert (whole.completion, whole.stop_reason, whole.model_id, whole.reasoning) == ("yes", "stop", "m-dated", "hm")
    assert (whole.input_tokens, whole.output_tokens, cut.stop_reason) == (7, 5, "max_output_tokens")
    # Another seed is another draw, though none is sent; what was set is, and nothing is left with OpenAI.
    call(seed=2)
    assert len(server.requests) == 3
    plain, set_ = server.requests[:2]
    assert not {"seed", "temperature", "max_output_tokens"} & set(plain) and plain["store"] is False
    assert (set_["max_output_tokens"], set_["temperature"], set_["model"]) == (9, 0.5, "m")
    with pytest.raises(InputError, match="stop: openai-responses takes no such"):
        call(stop="x")
    # The same question by the other protocol is another question.
    assert ask(own, "a", system_prompt="S", seed=1) == [["yes"]] and len(server.requests) == 4


def test_equal_questions_in_flight_are_one_request(tmp_path: Path, server: FaultServer) -> None:
    server.delay = 0.2
    own = config(tmp_path, server)
    assert ask(own, *["same"] * 20, "other") == [["server on same with None"]] * 20 + [["server on other with None"]]
    assert sorted(server.questions) == ["other", "same"]
    # Without a cache every call is a draw of its own.
    ask(config(tmp_path / "b", server, enable_cache=False), *["same"] * 3)
    assert server.attempts["same"] == 4


def test_the_cache_answers_a_new_process_and_tells_parameters_apart(tmp_path: Path, server: FaultServer) -> None:
    first = ask(config(tmp_path / "a", server, cache_dir=tmp_path / "c"), "q", seed=0)
    assert ask(config(tmp_path / "b", server, cache_dir=tmp_path / "c"), "q", seed=0) == first
    assert len(server.requests) == 1
    own = config(tmp_path / "b", server, cache_dir=tmp_path / "c")
    for parameters in ({}, {"seed": 1}, {"seed": 0, "temperature": 1.0}, {"seed": 0, "system_prompt": "S"}):
        ask(own, "q", **parameters)
    ask(own, "q", model_id="openai:other", seed=0)
    assert len(server.requests) == 6


def test_two_servers_under_one_name_share_nothing(tmp_path: Path, server: FaultServer) -> None:
    with serve(name="another") as other:
        for _ in range(2):
            assert ask(config(tmp_path, server), "q") == [["server on q with None"]]
            assert ask(config(tmp_path, other), "q") == [["another on q with None"]]
        assert len(server.requests) == len(other.requests) == 1


def test_without_the_cache_nothing_is_read_or_written(tmp_path: Path, server: FaultServer) -> None:
    ask(config(tmp_path, server), "q")
    ask(config(tmp_path, server, enable_cache=False), "q")
    assert len(server.requests) == 2
    ask(config(tmp_path / "off", server, enable_cache=False), "q")
    assert not (tmp_path / "off").exists()


def test_a_failure_is_not_kept_and_hinders_no_other(tmp_path: Path, server: FaultServer) -> None:
    server.fault = lambda question, attempt: "500" if question == "bad" else None
    own = config(tmp_path, server, max_attempts=2)
    bad, good = ask(own, "bad", "good")
    assert isinstance(bad, ApiFailure) and bad.status == 500 and bad.attempts == 2
    assert good == ["server on good with None"]
    server.fault = lambda question, attempt: None
    assert ask(own, "bad") == [["server on bad with None"]]


def test_a_wait_that_the_server_asks_for_is_waited(tmp_path: Path, server: FaultServer) -> None:
    server.fault = lambda question, attempt: "429" if attempt == 1 else None
    started = asyncio.run(_timed(config(tmp_path, server)))
    assert server.attempts["q"] == 2 and started >= 1.0


async def _timed(own: ApiConfigBase) -> float:
    loop = asyncio.get_running_loop()
    start = loop.time()
    await ask_single_question(own.api, "openai:m", "q")
    await own.api.close()
    return loop.time() - start


@pytest.mark.parametrize(("kind", "told"), [("400", "fault 400"), ("too_long", "maximum context length")])
def test_a_refusal_is_no_answer_and_is_not_asked_again(
    tmp_path: Path, server: FaultServer, kind: str, told: str
) -> None:
    server.fault = lambda question, attempt: kind
    (failure,) = ask(config(tmp_path, server), "q")
    assert isinstance(failure, ApiFailure) and told in failure.reason and len(server.requests) == 1


@pytest.mark.parametrize("kind", ["hang", "broken", "broken_off", "not_the_protocol", "disconnect"])
def test_what_a_server_may_do_wrong_is_tried_again(tmp_path: Path, server: FaultServer, kind: str) -> None:
    server.fault = lambda question, attempt: kind if attempt == 1 else None
    assert ask(config(tmp_path, server, request_timeout=1.5), "q") == [["server on q with None"]]
    assert server.attempts["q"] == 2


def test_an_unknown_key_is_tried_once_not_once_a_question(tmp_path: Path, server: FaultServer) -> None:
    server.fault = lambda question, attempt: "echo"
    failures = ask(config(tmp_path, server, openai_num_threads=1), *map(str, range(10)))
    assert len(server.requests) == 1
    assert all(isinstance(failure, ApiFailure) and failure.status == 401 for failure in failures)
    # The server's text holds the key; ours does not.
    assert all(KEY not in str(failure) and "<withheld>" in str(failure) for failure in failures)


def test_calls_at_once_are_bounded(tmp_path: Path, server: FaultServer) -> None:
    server.delay = 0.05
    ask(config(tmp_path, server, openai_num_threads=3), *map(str, range(12)))
    assert server.most_at_once == 3 and len(server.requests) == 12


def test_one_object_serves_several_event_loops(tmp_path: Path, server: FaultServer) -> None:
    own = config(tmp_path, server, openai_num_threads=1)
    for question in ("a", "b"):
        assert ask(own, question, question + "!")[0] == [f"server on {question} with None"]
    first = own.api
    own.reset_api()
    assert own.api is not first


def test_several_completions_and_what_else_an_answer_holds(tmp_path: Path, server: FaultServer) -> None:
    server.completion = lambda body: {"content": "<think>\nhm\n</think>\n\nyes", "finish_reason": "length"}
    own = config(tmp_path, server)
    messages = [{"role": "user", "content": "q"}]

    async def call() -> list[Any]:
        return await api_call(own.api, "openai:m", messages, n=2)

    first, second = asyncio.run(call())
    assert (first.completion, first.reasoning, first.stop_reason, first.model_id) == ("yes", "hm", "length", "m-dated")
    assert (first.input_tokens, first.output_tokens, second.output_tokens) == (7, 5, 0)


def test_costs_are_null_without_a_price(tmp_path: Path, server: FaultServer) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text('{"m": {"input": 1.0, "output": 2.0}}')
    for name, path in (("priced", prices), ("unpriced", None)):
        own = config(tmp_path / name, server, prices_path=path)
        ask(own, "a", "b")
        own.log_api_cost({"step": "one"})
        ask(own, "a")
        own.log_api_cost()
    rows = [json.loads(line) for line in (tmp_path / "priced" / "api-costs.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "cost": pytest.approx(2 * (7 * 1 + 5 * 2) / 1e6), "requests": 2, "from_cache": 0, "failures": 0,
        "input_tokens": 14, "output_tokens": 10, "step": "one",
    }  # fmt: skip
    assert (rows[1]["cost"], rows[1]["requests"], rows[1]["from_cache"]) == (0, 0, 1)
    rows = [json.loads(line) for line in (tmp_path / "unpriced" / "api-costs.jsonl").read_text().splitlines()]
    assert [row["cost"] for row in rows] == [None, 0]


def test_the_history_holds_questions_and_answers(
    tmp_path: Path, server: FaultServer, capsys: pytest.CaptureFixture[str]
) -> None:
    own = config(tmp_path, server, enable_prompt_history=True, print_prompt_and_response=True)
    ask(own, "q")
    (path,) = (tmp_path / "prompt-history").iterdir()
    assert "[user] q\n[answer of m-dated] server on q" in path.read_text() and "server on q" in capsys.readouterr().out


def test_a_script_with_safetyttoolings_config_asks_too(tmp_path: Path, server: FaultServer) -> None:
    own = ExperimentConfigBase(output_dir=tmp_path, openai_base_url=server.url)
    assert isinstance(own.api, ApiClient)
    assert ask(own, "q", model_id="m") == [["server on q with None"]]
