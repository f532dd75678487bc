"""The chat server as clients see it: OpenAI's shape, steering by request, streams, uncertainty, kept states."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from src.ask import AskConfig
from src.ask import main as ask
from src.common.interventions import entry
from src.common.jsonl import read_jsonl, round_measured
from src.models.chat_format import PersonaRenderer
from src.models.language_model import LanguageModel, generate_all
from src.models.types import GenerationRequest, GenerationResult
from tests.chat_server import CHAT, QUESTION, Served, body_of, parts_of


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def local(
    chat_model: LanguageModel, spec: list[dict[str, Any]] | None = None, persona: str | None = None,
    max_tokens: int = 12, **changed: Any,
) -> GenerationResult:  # fmt: skip
    """What the model answers without any server."""
    prompt = PersonaRenderer(chat_model.tokenizer, "both" if persona else "system").render(QUESTION, persona)
    acting = chat_model.resolve([entry(each, "test") for each in spec]) if spec else ()
    request = GenerationRequest(
        id="x", token_ids=prompt.token_ids, max_tokens=max_tokens, interventions=acting, **changed
    )
    return generate_all(chat_model, [request])[0]


def spec_of(chat_directions: Path, layer: int, coefficient: float, **fields: Any) -> list[dict[str, Any]]:
    path = str(chat_directions / "one.safetensors")
    return [{"directions_path": path, "layers": str(layer), "op": "add", "coefficient": coefficient, **fields}]


def test_openais_client_streaming_and_not(
    client: openai.OpenAI, chat_model: LanguageModel, chat_directions: Path
) -> None:
    expected = local(chat_model)
    asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected.text and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12 and answer.usage.total_tokens == 12 + answer.usage.prompt_tokens
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == answer.usage and chunks[-1].choices == []
    assert client.models.list().data[0].id == "tiny" == client.models.retrieve("tiny").id


def test_completions_of_texts_and_tokens_streaming_and_not(client: openai.OpenAI, chat_model: LanguageModel) -> None:
    texts = ["Once upon a time", "The sea"]
    ids = [chat_model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    bos = chat_model.tokenizer.bos_token_id
    ids = [[bos, *each] for each in ids]
    requests = [GenerationRequest(id=str(i), token_ids=tuple(each), max_tokens=16) for i, each in enumerate(ids)]
    expected = [result.text for result in generate_all(chat_model, requests)]
    for prompt in (texts, ids):
        answer = client.completions.create(model="tiny", prompt=prompt, temperature=0)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    chunks = list(client.completions.create(model="tiny", prompt=texts, temperature=0, stream=True))
    for i, text in enumerate(expected):
        assert "".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) == text


def test_draws_come_from_the_seed(served: Served, chat_model: LanguageModel, chat_directions: Path) -> None:
    def texts(**body: Any) -> list[str]:
        return [each["message"]["content"] for each in served.ask(temperature=1, **body).json()["choices"]]

    assert texts(seed=7) == [local(chat_model, temperature=1.0, seed=7).text] != texts(seed=8)
    three = texts(seed=7, n=3)
    assert three[0] == texts(seed=7)[0] and len(set(three)) == 3
    drawn = served.ask(temperature=1).json()
    assert texts(seed=drawn["tiller"]["seeds"][0]) == [drawn["choices"][0]["message"]["content"]]
    assert texts() != texts()


FORMS = [
    (["one:0:6"], [("0", 6.0, {})]),
    (["one:0:6", "one:1:-9"], [("0", 6.0, {}), ("1", -9.0, {})]),
    (
        [{"directions_path": "one", "layers": "1", "op": "add", "coefficient": 20, "positions": "generated"}],
        [("1", 20.0, {"positions": "generated"})],
    ),
    (["one:best:8"], [("0", 8.0, {})]),
]


@pytest.mark.parametrize(("steering", "expected"), FORMS)
def test_a_request_is_steered_as_any_command_steers(
    served: Served, chat_model: LanguageModel, chat_directions: Path, steering: list, expected: list
) -> None:
    spec = [entry for layer, c, more in expected for entry in spec_of(chat_directions, int(layer), c, **more)]
    wanted = local(chat_model, spec)
    answer = served.ask(steering=steering, uncertainty=True).json()
    tokens = answer["choices"][0]["uncertainty"]
    assert tuple(token["token_id"] for token in tokens) == wanted.token_ids != local(chat_model).token_ids
    fingerprint = chat_model.resolve([entry(each, "test") for each in spec]).fingerprint
    assert answer["tiller"]["steering"] == fingerprint
    assert [token["entropy"] for token in tokens] == pytest.approx(list(map(round_measured, wanted.entropy)), abs=2e-4)


def test_uncertainty_of_each_token_covers_the_text(served: Served) -> None:
    answer = served.ask(uncertainty=True, max_tokens=40).json()["choices"][0]
    assert "".join(token["text"] for token in answer["uncertainty"]) == answer["message"]["content"]
    chunks = parts_of(served.ask(uncertainty=True, max_tokens=40, stream=True).text)
    tokens = [token for chunk in chunks for token in chunk["choices"][0].get("uncertainty", [])]
    numbers = [(token["token_id"], token["entropy"], token["top_k_mass"]) for token in tokens]
    assert numbers == [(each["token_id"], each["entropy"], each["top_k_mass"]) for each in answer["uncertainty"]]
    assert all(0 < each["entropy"] < 11 and 0 < each["top_k_mass"] < 1 for each in tokens)


async def test_eight_clients_at_once_get_what_each_gets_alone(served: Served) -> None:
    # Spec forms, persona and draws too; the longest answers do not wait for the shortest.
    bodies = [
        body_of(steering=[f"one:{i % 2}:{0.1 * i:.1f}"] if i else [], max_tokens=20 + i, uncertainty=True,
                stream=i % 2 == 1, temperature=0.8 if i > 4 else 0, seed=i, **({"persona": "Hamlet"} if i == 3 else {}))
        for i in range(8)
    ]  # fmt: skip

    async def tokens(client: httpx.AsyncClient, body: dict[str, Any]) -> list[int]:
        parts = parts_of((await client.post(f"{served.url}{CHAT}", json=body)).text)
        found = [each for part in parts for choice in part["choices"] for each in choice.get("uncertainty", [])]
        return [each["token_id"] for each in found]

    async with httpx.AsyncClient(timeout=120) as client:
        alone = [await tokens(client, body) for body in bodies]
        together = await asyncio.gather(*(tokens(client, body) for body in bodies * 2))
    assert together == alone * 2
    assert len({tuple(each[:20]) for each in alone}) == 8 and [len(each) for each in alone] == list(range(20, 28))


def test_a_persona_is_rendered_as_in_a_run(served: Served, chat_model: LanguageModel, chat_directions: Path) -> None:
    expected = local(chat_model, persona="Hamlet")
    answer = served.ask(persona="Hamlet").json()
    assert answer["choices"][0]["message"]["content"] == expected.text != local(chat_model).text
    assert answer["tiller"]["persona_applied"] == "header+system"
    pirate = [served.ask(persona=each).json()["choices"][0]["message"] for each in (
        "a pirate", {"persona": "pirate", "article": "a"})]  # fmt: skip
    assert pirate[0] == pirate[1] != answer["choices"][0]["message"]


def test_kept_states_are_told_in_numbers(served: Served, chat_model: LanguageModel, chat_directions: Path) -> None:
    keep = {"layers": "0-1", "positions": "generated", "directions": ["one"]}
    wanted = local(chat_model, spec_of(chat_directions, 0, 6.0))
    answer = served.ask(steering=["one:0:6"], capture=keep).json()["choices"][0]
    plain = served.ask(capture=keep).json()["choices"][0]
    assert [(row["layer"], row["n_positions"]) for row in answer["capture"]] == [(0, 11), (1, 11)]
    # Adding 6 of a direction moves the projection on it by about 6 at the same layer; the tokens differ.
    moved = answer["capture"][0]["mean_projection"]["one"] - plain["capture"][0]["mean_projection"]["one"]
    assert 4.5 < moved < 7.5 and wanted.text == answer["message"]["content"]
    last = parts_of(served.ask(steering=["one:0:6"], capture=keep, stream=True).text)[-1]
    assert last["choices"][0]["capture"] == answer["capture"]


def test_a_text_ends_an_answer_before_it(served: Served) -> None:
    whole = served.ask(max_tokens=40).json()["choices"][0]["message"]["content"]
    middle = whole[len(whole) // 2 :][:5]
    for stream in (False, True):
        response = served.ask(max_tokens=40, stop=["never to be seen", middle], stream=stream)
        if stream:
            parts = parts_of(response.text)
            text = "".join(each["choices"][0]["delta"].get("content", "") for each in parts)
            reason = parts[-1]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert (text, reason) == (whole[: whole.index(middle)], "stop")


def test_inspect_ai_and_ask_against_it(served: Served, tmp_path: Path, chat_model: LanguageModel, chat_directions: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from inspect_ai.model import GenerateConfig, get_model

    expected = local(chat_model).text
    settings = GenerateConfig(temperature=0, max_tokens=12)
    asked = get_model("openai-api/tiller/tiny", base_url=f"{served.url}/v1", api_key="none", config=settings)
    answer = asyncio.run(asked.generate(QUESTION[0]["content"]))
    assert (answer.completion, answer.stop_reason) == (expected, "max_tokens")
    steered = GenerateConfig(extra_body={"steering": ["one:0:6"]})
    answer = asyncio.run(asked.generate(QUESTION[0]["content"], config=steered))
    wanted = local(chat_model, spec_of(chat_directions, 0, 6.0)).text
    assert answer.completion == wanted != expected
    for name in ("OPENAI_API_KEY", "OPENAI_API_KEY1", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    dataset = tmp_path / "questions.jsonl"
    dataset.write_text("".join(json.dumps({"id": str(i), "prompt": QUESTION[0]["content"]}) + "\n" for i in range(3)))
    ask(
        AskConfig(
            dataset_path=str(dataset), model_id="vllm:tiny", vllm_base_url=f"{served.url}/v1", n_repeats=2,
            temperature=1.0, max_tokens=12, output_dir=tmp_path / "asked",
        )
    )  # fmt: skip
    rows = [row for _, row in read_jsonl(tmp_path / "asked" / "results.jsonl")]
    # A repeat's seed is its number.
    drawn = [local(chat_model, temperature=1.0, seed=seed).text for seed in (0, 1)]
    assert [row["response"] for row in rows] == drawn * 3
