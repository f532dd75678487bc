"""
Asking an embedding server, `src.serve embeddings` or any other that speaks OpenAI's protocol, and what is done with its
vectors on this side: similarity, ranking, filtering.

    client = EmbeddingClient("http://127.0.0.1:8080")
    client.rank("a ship in a storm", texts, top_k=3)
"""

import asyncio
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.common.errors import InputError
from src.common.secrets import secret
from src.embedding.openai_encoder import answer_vectors
from src.ops.top_rows import TopRows, exact_cosines

URL = "http://127.0.0.1:8080"
MAX_RETRIES = 10
"""Of a request that the server has no room for (429, after the seconds that it names) or that the network loses."""
SECONDS_PER_REQUEST = 600.0
TEXTS_PER_REQUEST, IMAGES_PER_REQUEST = 256, 16
AT_ONCE = 4
KEY = "TILLER_API_KEY"


class Hit(NamedTuple):
    """One of the vectors that were looked through."""

    index: int
    cosine: float


def similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, dim) and (m, dim) → (n, m) float64 cosines. Raises InputError for a zero vector, which has no direction."""
    units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (_rows(vectors), _rows(others))]
    return np.clip(units[0] @ units[1].T, -1.0, 1.0)


def rank(query: np.ndarray, vectors: np.ndarray, top_k: int | None = None) -> list[Hit]:
    """
    The nearest of `vectors` (n, dim) to `query` (dim,) by cosine, the nearest first, equal ones in their order; all of
    them without top_k. Raises InputError for a zero vector.
    """
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k {top_k}: expected at least 1")
    rows = _rows(vectors)
    if not len(rows):
        return []
    found = TopRows(_rows(query[None]), len(rows) if top_k is None else top_k)
    found.add(rows, [(index,) for index in range(len(rows))], 0)
    return [Hit(each.place, each.cosine) for each in found.best()[0]]


def at_least(query: np.ndarray, vectors: np.ndarray, min_cosine: float) -> list[Hit]:
    """Those of `vectors` (n, dim) whose cosine with `query` (dim,) is min_cosine or more, in their order."""
    rows = _rows(vectors)
    cosines = exact_cosines(rows, np.broadcast_to(_rows(query[None]), rows.shape))
    return [Hit(int(index), float(cosines[index])) for index in np.flatnonzero(cosines >= min_cosine)]


def _rows(vectors: np.ndarray) -> np.ndarray:
    rows = np.asarray(vectors, dtype=np.float64)
    zero = np.flatnonzero(~rows.any(axis=1))
    if len(zero) or not np.isfinite(rows).all():
        raise InputError(f"vector {zero[0] if len(zero) else '?'}: all zero or not finite, so it has no direction")
    return rows


class _Requests:
    """What both clients send, and how they read the answers."""

    def __init__(
        self,
        base_url: str = URL,
        *,
        model: str | None = None,
        api_key: str | None = None,
        dimensions: int | None = None,
        truncate: bool | None = None,
    ) -> None:
        """
        model: the only one that is served unless given. api_key: that in TILLER_API_KEY unless given. dimensions: only
        the first of each vector. truncate: of `src.serve embeddings`, cut longer texts off instead of an error.
        """
        self._url, self.model = base_url.rstrip("/").removesuffix("/v1"), model
        extra = {} if truncate is None else {"extra_body": {"truncate": truncate}}
        self._options: dict[str, Any] = extra | ({} if dimensions is None else {"dimensions": dimensions})
        self._dimensions = dimensions
        self._client = self._connected(
            base_url=f"{self._url}/v1", api_key=api_key or secret(KEY) or "none", max_retries=MAX_RETRIES,
            timeout=SECONDS_PER_REQUEST,
        )  # fmt: skip

    def _connected(self, **options: Any) -> Any:
        raise NotImplementedError

    def _texts(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"model": self.model, "input": list(texts), **self._options}

    def _vectors(self, answer: Any, count: int) -> np.ndarray:
        return answer_vectors(answer, count, str(self.model))

    def _images(self, images: Sequence[bytes]) -> dict[str, Any]:
        body: dict[str, Any] = {"images": [base64.b64encode(each).decode() for each in images]}
        return body if self._dimensions is None else body | {"dimensions": self._dimensions}

    def _only_model(self, names: Sequence[str]) -> str:
        if len(names) != 1:
            raise InputError(f"{self._url} serves {', '.join(names) or 'no model'}; choose one: model=…")
        return names[0]


class EmbeddingClient(_Requests):
    """One request after another. Errors of the server are raised as openai's (APIStatusError and its kin)."""

    def _connected(self, **options: Any) -> Any:
        from openai import OpenAI

        return OpenAI(**options)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 in the order of the texts."""
        self._find_model()
        parts = [
            self._vectors(self._client.embeddings.create(**self._texts(part)), len(part))
            for part in _parts(texts, TEXTS_PER_REQUEST)
        ]
        return _joined(parts)

    def embed_images(self, images: Sequence[Path | bytes]) -> np.ndarray:
        """(n, dim) float32 of image files."""
        parts = [
            self._client.post(f"{self._url}/embed_image", body=self._images(part), cast_to=object)
            for part in _parts([_bytes(each) for each in images], IMAGES_PER_REQUEST)
        ]
        return _joined([np.array(part["embeddings"], dtype=np.float32) for part in parts])

    def similarity(self, texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """(n, m) cosines."""
        return similarity(*self._two(texts, others))

    def rank(self, query: str, texts: Sequence[str], top_k: int | None = None) -> list[Hit]:
        """The texts nearest to the query, the nearest first."""
        (query_vector,), vectors = self._two([query], texts)
        return rank(query_vector, vectors, top_k)

    def filter(self, query: str, texts: Sequence[str], min_cosine: float) -> list[Hit]:
        """The texts that are near enough to the query, in their order."""
        (query_vector,), vectors = self._two([query], texts)
        return at_least(query_vector, vectors, min_cosine)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def __enter__(self) -> "EmbeddingClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _two(self, texts: Sequence[str], others: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        vectors = self.embed([*texts, *others])
        return vectors[: len(texts)], vectors[len(texts) :]

    def _find_model(self) -> None:
        if self.model is None:
            self.model = self._only_model([each.id for each in self._client.models.list().data])


class AsyncEmbeddingClient(_Requests):
    """The same with several requests at once, for use in an event loop."""

    def __init__(self, base_url: str = URL, *, at_once: int = AT_ONCE, **options: Any) -> None:
        """at_once: requests on their way at a time. The others are those of EmbeddingClient."""
        super().__init__(base_url, **options)
        self._free = asyncio.Semaphore(at_once)

    def _connected(self, **options: Any) -> Any:
        from openai import AsyncOpenAI

        return AsyncOpenAI(**options)

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 in the order of the texts."""
        await self._find_model()

        async def send(part: Sequence[str]) -> np.ndarray:
            async with self._free:
                return self._vectors(await self._client.embeddings.create(**self._texts(part)), len(part))

        return _joined(await asyncio.gather(*(send(part) for part in _parts(texts, TEXTS_PER_REQUEST))))

    async def embed_images(self, images: Sequence[Path | bytes]) -> np.ndarray:
        """(n, dim) float32 of image files."""

        async def send(part: Sequence[bytes]) -> np.ndarray:
            async with self._free:
                body = self._images(part)
                answer: Any = await self._client.post(f"{self._url}/embed_image", body=body, cast_to=object)
                return np.array(answer["embeddings"], dtype=np.float32)

        files = [_bytes(each) for each in images]
        return _joined(await asyncio.gather(*(send(part) for part in _parts(files, IMAGES_PER_REQUEST))))

    async def similarity(self, texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """(n, m) cosines."""
        return similarity(*await asyncio.gather(self.embed(texts), self.embed(others)))

    async def rank(self, query: str, texts: Sequence[str], top_k: int | None = None) -> list[Hit]:
        """The texts nearest to the query, the nearest first."""
        (query_vector,), vectors = await asyncio.gather(self.embed([query]), self.embed(texts))
        return rank(query_vector, vectors, top_k)

    async def filter(self, query: str, texts: Sequence[str], min_cosine: float) -> list[Hit]:
        """The texts that are near enough to the query, in their order."""
        (query_vector,), vectors = await asyncio.gather(self.embed([query]), self.embed(texts))
        return at_least(query_vector, vectors, min_cosine)

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def __aenter__(self) -> "AsyncEmbeddingClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _find_model(self) -> None:
        if self.model is None:
            self.model = self._only_model([each.id for each in (await self._client.models.list()).data])


def _parts(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    return [items[start : start + most] for start in range(0, len(items), most)]


def _bytes(image: Path | bytes) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
