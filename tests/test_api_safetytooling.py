"""One contract for both backends of `config.api`, against the same server."""

import asyncio
import importlib.util
import os
from pathlib import Path

import pytest

from src.ask import AskConfig, main
from src.common.api_backends import put_keys
from src.common.api_config import ApiConfigBase
from src.common.jsonl import read_jsonl
from src.common.safetytooling_wrappers import api_call, ask_single_question
from src.common.secrets import withhold
from tests.fault_server import FaultServer

MISSING = pytest.mark.skipif(
    importlib.util.find_spec("safetytooling") is None, reason="safetytooling is not installed: extra safetytooling"
)
BACKENDS = ["inspect", pytest.param("safetytooling", marks=MISSING)]
MODEL = "openai:gpt-4o-mini"


def config(folder: Path, server: FaultServer, backend: str) -> ApiConfigBase:
    return ApiConfigBase(output_dir=folder, model_id=MODEL, openai_base_url=server.url, api_backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_question_and_a_conversation_have_an_answer(tmp_path: Path, server: FaultServer, backend: str) -> None:
    own = config(tmp_path, server, backend)
    talk = [("user", "a"), ("assistant", "b"), ("user", "c")]

    async def both() -> tuple[list[str], list]:
        first = await ask_single_question(own.api, MODEL, "q", system_prompt="S", seed=3, temperature=0.5)
        messages = [{"role": role, "content": content} for role, content in talk]
        return first, await api_call(own.api, MODEL, messages, seed=4)

    first, second = asyncio.run(both())
    assert first == ["server on q with 3"]
    assert [answer.completion for answer in second] == ["server on c with 4"]
    assert str(getattr(second[0].stop_reason, "value", second[0].stop_reason)) in ("stop", "stop_sequence")
    assert [message["content"] for message in server.requests[0]["messages"]] == ["S", "q"]
    assert (server.requests[0]["temperature"], server.requests[0]["seed"]) == (0.5, 3)
    assert [(message["role"], message["content"]) for message in server.requests[1]["messages"]] == talk
    for request in server.requests:
        assert request.get("max_tokens") is None and request["model"] == "gpt-4o-mini"
    # Asked again, the cache answers; another seed is another question.
    assert asyncio.run(both())[0] == first and len(server.requests) == 2


def test_the_keys_that_safetytooling_is_given_are_withheld(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-of-another-name")
    monkeypatch.setenv("MINE", "sk-in-my-variable")
    put_keys(ApiConfigBase(output_dir=tmp_path, model_id=MODEL, openai_base_url=server.url, openai_tag="MINE"))
    assert os.environ["OPENAI_API_KEY"] == "sk-in-my-variable"
    assert withhold("sk-in-my-variable, sk-of-another-name") == "<withheld>, <withheld>"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command_asks_through_both(tmp_path: Path, server: FaultServer, backend: str) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("one\ntwo\n")
    main(
        AskConfig(
            dataset_path=str(path), model_id=MODEL, openai_base_url=server.url, api_backend=backend, n_repeats=2,
            output_dir=tmp_path / "run",
        )
    )  # fmt: skip
    rows = [row for _, row in read_jsonl(tmp_path / "run" / "results.jsonl")]
    assert [row["response"] for row in rows] == [
        f"server on {q} with {seed}" for q in ("one", "two") for seed in (0, 1)
    ]
