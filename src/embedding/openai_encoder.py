"""A shard's texts to vectors by a server that speaks the OpenAI protocol: the plan and its cost, and the requests."""

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from src.common.errors import InputError
from src.embedding.encoder import Report
from src.embedding.records import Piece, Shard
from src.embedding.settings import EmbedSettings

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import CreateEmbeddingResponse

INPUTS_PER_REQUEST, TOKENS_PER_REQUEST = 2048, 300_000
MAX_RETRIES = 10
SECONDS_PER_REQUEST = 120.0
BYTES_PER_TOKEN = 4
"""Of English text, roughly: for estimates only. No text has more tokens than UTF-8 bytes: that is for the limits."""
PRICES = {"text-embedding-3-small": 0.02, "text-embedding-3-large": 0.13, "text-embedding-ada-002": 0.10}
"""US dollars for a million tokens, as published in 2025."""


class RequestPlan(NamedTuple):
    """What a run would send."""

    texts: int = 0
    tokens: int = 0
    requests: int = 0

    def plus(self, texts: Sequence[str], prompt: str) -> "RequestPlan":
        """With a shard's texts added, the prompt before each."""
        texts = [prompt + text for text in texts]
        tokens = sum(estimated_tokens(text) for text in texts)
        return RequestPlan(self.texts + len(texts), self.tokens + tokens, self.requests + len(cut_requests(texts)))

    def cost(self, settings: EmbedSettings) -> float | None:
        """US dollars, or None where the price is not known."""
        price = settings.price_per_million
        if price is None and settings.base_url is None:
            price = PRICES.get(settings.model_id)
        return None if price is None else self.tokens * price / 1e6


def estimated_tokens(text: str) -> int:
    """Roughly how many tokens a text has."""
    return max(1, round(len(text.encode()) / BYTES_PER_TOKEN))


def cut_requests(texts: Sequence[str]) -> list[slice]:
    """Ranges of texts in order, each within both limits, except that a single text may exceed the second."""
    ranges, start, size = [], 0, 0
    for number, text in enumerate(texts):
        most = len(text.encode()) + 2
        if number > start and (number - start == INPUTS_PER_REQUEST or size + most > TOKENS_PER_REQUEST):
            ranges.append(slice(start, number))
            start, size = number, 0
        size += most
    return [*ranges, slice(start, len(texts))] if texts else []


def whole_texts(texts: Sequence[str]) -> list[Piece]:
    """One piece a text, without tokens: the server has the tokenizer."""
    return [Piece(number, 0, None, truncated=False) for number in range(len(texts))]


class OpenAIEncoder:
    """Requests of at most 2,048 inputs and 300,000 tokens, several at once, retried as the server asks."""

    def __init__(self, settings: EmbedSettings) -> None:
        """Sends one short request, to learn the dimension. Raises InputError without a key, or where that fails."""
        key = os.environ.get(settings.openai_tag)
        if not key and settings.base_url is None:
            raise InputError(f"--backend openai: no key in the variable {settings.openai_tag}; set it, or --openai_tag")
        self._key, self._base_url = key or "none", settings.base_url
        self._model, self._prompt = settings.model_id, settings.prompt or ""
        self._at_once = settings.openai_num_threads
        self.dim = len(self.embed_one("dimension"))

    def encode(self, shard: Shard, report: Report) -> None:
        """Sets the shard's embeddings; raises InputError for what the server refuses or keeps failing at."""
        embeddings, tokens = asyncio.run(self._embed([self._prompt + text for text in shard.texts], report))
        shard.embeddings, shard.padded_tokens = embeddings, tokens

    def close(self) -> None:
        """Nothing to give back: each shard's client is closed with it."""

    def embed_one(self, text: str) -> np.ndarray:
        """The vector of a single text, in a request of its own."""
        return asyncio.run(self._embed([self._prompt + text], lambda pieces, tokens: None))[0][0]

    async def _embed(self, texts: Sequence[str], report: Report) -> tuple[np.ndarray, int]:
        from openai import AsyncOpenAI

        free = asyncio.Semaphore(self._at_once)
        async with AsyncOpenAI(
            api_key=self._key, base_url=self._base_url, max_retries=MAX_RETRIES, timeout=SECONDS_PER_REQUEST
        ) as client:

            async def send(part: slice) -> tuple[np.ndarray, int]:
                async with free:
                    found, tokens = await self._request(client, texts[part])
                report(len(found), tokens)
                return found, tokens

            tasks = [asyncio.ensure_future(send(part)) for part in cut_requests(texts)]
            try:
                answers = await asyncio.gather(*tasks)
            except BaseException:
                # gather lets the others go on, and they would go on spending.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise
        vectors = [found for found, _ in answers]
        dim = getattr(self, "dim", None) or (vectors[0].shape[1] if vectors else 0)
        if any(found.shape[1] != dim for found in vectors):
            raise InputError(f"--model_id {self._model}: the server's vectors have another dimension than {dim} now")
        return np.concatenate(vectors) if vectors else np.empty((0, dim), np.float32), sum(n for _, n in answers)

    async def _request(self, client: "AsyncOpenAI", texts: Sequence[str]) -> tuple[np.ndarray, int]:
        from openai import APIError

        try:
            answer = await client.embeddings.create(model=self._model, input=list(texts), encoding_format="float")
        except APIError as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(
                f"--model_id {self._model} at {self._base_url or 'api.openai.com'}: {type(error).__name__}: {said}; "
                f"finished shards are kept, and the same command goes on from here"
            ) from error
        return answer_vectors(answer, len(texts), self._model), answer.usage.prompt_tokens if answer.usage else 0


def answer_vectors(answer: "CreateEmbeddingResponse", count: int, model: str) -> np.ndarray:
    """(count, dim) float32 in the order of the inputs. Raises InputError where one is missing or of another length."""
    found: dict[int, Any] = {item.index: item.embedding for item in answer.data or []}
    if sorted(found) != list(range(count)) or len({len(vector) for vector in found.values()}) != 1:
        raise InputError(f"--model_id {model}: the server answered {count} texts with {len(found)} vectors or lengths")
    return np.array([found[index] for index in range(count)], dtype=np.float32)
