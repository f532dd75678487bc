"""The paths of an embedding server: what comes in becomes jobs for the worker, what comes out OpenAI's or our shape."""

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from src.common.errors import InputError
from src.serving.bodies import read_json
from src.serving.embedding_bodies import (
    EmbeddingsAnswer,
    ImagesAnswer,
    TextsAnswer,
    embeddings_request,
    images_request,
    texts_request,
)
from src.serving.embedding_metrics import EmbeddingMetrics
from src.serving.embedding_queue import Job
from src.serving.embedding_types import IMAGE, TEXT, Embedder
from src.serving.embedding_worker import EmbeddingWorker
from src.serving.errors import ApiError
from src.serving.gone import GONE, unless_gone
from src.serving.guard import App
from src.serving.http_app import HEALTH, METRICS, make_app
from src.serving.metrics import CONTENT_TYPE
from src.serving.openapi import Operation, describe
from src.serving.settings import EmbeddingServerSettings

EMBEDDINGS, MODELS, EMBED_TEXT, EMBED_IMAGE = "/v1/embeddings", "/v1/models", "/embed_text", "/embed_image"
PATHS = frozenset({EMBEDDINGS, MODELS, EMBED_TEXT, EMBED_IMAGE, HEALTH, METRICS, "/openapi.json"})
INLINE_CHARACTERS = 20_000
"""Texts of together no more are tokenized in the event loop: a thread costs more than they do."""
IMAGE_WEIGHT = 16


class EmbeddingApp:
    """The handlers of one model."""

    def __init__(
        self, embedder: Embedder, worker: EmbeddingWorker, metrics: EmbeddingMetrics,
        settings: EmbeddingServerSettings, name: str,
    ) -> None:  # fmt: skip
        """name: what requests call the model."""
        self._embedder, self._worker, self._metrics = embedder, worker, metrics
        self._settings, self._name = settings, name
        self._embeddings_request = embeddings_request(embedder, settings.max_texts)
        self._texts_request = texts_request(embedder, settings.max_texts)
        self._images_request = images_request(embedder)

    def app(self) -> App:
        """All paths behind the guard."""
        routes = [
            Route(EMBEDDINGS, self.embeddings, methods=["POST"]),
            Route(MODELS, self.models),
            Route(EMBED_TEXT, self.embed_text, methods=["POST"]),
            Route(EMBED_IMAGE, self.embed_image, methods=["POST"]),
        ]
        return make_app(routes, self._settings, self._metrics, self.openapi(), self.health)

    async def embeddings(self, request: Request) -> Response:
        """OpenAI's /v1/embeddings."""
        asked = await read_json(request, self._embeddings_request)
        if asked.model != self._name:
            raise ApiError(404, f"model {asked.model[:200]!r} is not served here; {self._name!r} is", param="model",
                           code="model_not_found")  # fmt: skip
        is_one = isinstance(asked.input, str) or isinstance(asked.input[0], int)
        inputs = [asked.input] if is_one else asked.input
        if isinstance(inputs[0], str):
            ids, _ = await self._tokens(inputs, asked.truncate, "input")
        else:
            ids = [np.array(each, dtype=np.int32) for each in inputs]
        vectors = await self._vectors(request, TEXT, ids, [len(each) for each in ids], asked)
        shown = _base64(vectors) if asked.encoding_format == "base64" else vectors.tolist()
        data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(shown)]
        count = sum(len(each) for each in ids)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return _json({"object": "list", "data": data, "model": self._name, "usage": usage})

    async def embed_text(self, request: Request) -> Response:
        """Texts, and what was cut off of them."""
        asked = await read_json(request, self._texts_request)
        ids, truncated = await self._tokens(asked.texts, asked.truncate, "texts")
        lengths = [len(each) for each in ids]
        vectors = await self._vectors(request, TEXT, ids, lengths, asked)
        answer = {"model": self._name, "embeddings": vectors.tolist(), "n_tokens": lengths, "truncated": truncated}
        return _json(answer)

    async def embed_image(self, request: Request) -> Response:
        """Images, in the space of texts."""
        asked = await read_json(request, self._images_request)
        if not self._embedder.takes_images:
            message = f"the model {self._name} takes no images; serve a CLIP model, or ask {EMBED_TEXT}"
            raise ApiError(400, message, param="images", code="no_images")
        self._worker.refuse_full(len(asked.images), IMAGE_WEIGHT)
        pixels = [await asyncio.to_thread(self._pixels, n, image) for n, image in enumerate(asked.images)]
        lengths = [self._embedder.image_length()] * len(pixels)
        vectors = await self._vectors(request, IMAGE, pixels, lengths, asked, IMAGE_WEIGHT)
        return _json({"model": self._name, "embeddings": vectors.tolist()})

    async def models(self, request: Request) -> Response:
        """OpenAI's list of models."""
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "tiller"}
        return _json({"object": "list", "data": [model]})

    def health(self) -> dict[str, Any]:
        """What is served, and how vectors are made. Raises ApiError (503) when nothing is computed any more."""
        if not self._worker.is_alive:
            raise ApiError(503, "the thread that embeds has ended; the server's log says why")
        takes = {"images": self._embedder.takes_images, "token_ids": self._embedder.takes_tokens}
        limits = {"max_texts": self._settings.max_texts, "truncate": self._settings.truncate}
        return {"status": "ok", "model": self._name, "takes": takes, **limits, **self._embedder.facts}

    def openapi(self) -> dict[str, Any]:
        """Every path, its requests, answers and errors."""
        post = [
            (EMBEDDINGS, "Vectors, in OpenAI's shape", self._embeddings_request, EmbeddingsAnswer),
            (EMBED_TEXT, "Vectors of texts, and what was cut off", self._texts_request, TextsAnswer),
            (EMBED_IMAGE, "Vectors of images", self._images_request, ImagesAnswer),
        ]
        operations = [Operation(path=p, summary=s, method="post", body=b, answer=a) for p, s, b, a in post]
        operations += [
            Operation(path=MODELS, summary="The model"),
            Operation(path=HEALTH, summary="Whether vectors are made, and how", is_open=True),
            Operation(path=METRICS, summary="Counters, for Prometheus", media=CONTENT_TYPE),
        ]
        return describe(f"Embeddings by {self._name}", operations, self._settings.api_key is not None)

    async def _tokens(
        self, texts: Sequence[str], truncate: bool | None, param: str
    ) -> tuple[list[np.ndarray], list[bool]]:
        """Token ids of each text, and whether it was cut off. Raises ApiError for a longer one that must stay."""
        self._worker.refuse_full(len(texts))
        is_short = sum(len(text) for text in texts) <= INLINE_CHARACTERS
        pieces = (
            self._embedder.pieces_of(texts) if is_short else await asyncio.to_thread(self._embedder.pieces_of, texts)
        )
        cut = [each.truncated for each in pieces]
        if any(cut) and not (self._settings.truncate if truncate is None else truncate):
            raise ApiError(
                400, f"{param}: text {cut.index(True)} has more than the {self._embedder.max_length} tokens that the "
                f"model reads; shorten it, or send truncate: true", param=param, code="context_length_exceeded",
            )  # fmt: skip
        return [each.token_ids for each in pieces], cut

    def _pixels(self, number: int, image: str) -> np.ndarray:
        try:
            return self._embedder.pixels_of(base64.b64decode(image, validate=True))
        except InputError as error:
            raise ApiError(400, f"images: {number}: {error}", param="images") from None
        # binascii's, and that of letters beyond ASCII.
        except ValueError:
            raise ApiError(400, f"images: {number} is no base64", param="images") from None

    async def _vectors(
        self, request: Request, kind: str, inputs: Sequence[np.ndarray], lengths: Sequence[int], asked: Any,
        weight: int = 1,
    ) -> np.ndarray:  # fmt: skip
        """(n, dimensions) float32. Raises ApiError; ends at once when the client has gone."""
        place = f"{request.client.host}:{request.client.port}" if request.client else ""
        client = f"user {asked.user}" if asked.user else place
        job = Job(client=client, kind=kind, inputs=inputs, lengths=lengths, arrived=time.monotonic(), weight=weight)
        try:
            found = await unless_gone(request, self._worker.vectors(job))
        except ApiError as error:
            if error.status == GONE:
                self._metrics.gone.inc()
            raise
        return found if asked.dimensions is None else _shortened(found, asked.dimensions)


def _shortened(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first dimensions, scaled to length 1 as OpenAI does; a zero vector stays."""
    kept = vectors[:, :dimensions]
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    return kept / np.where(norms == 0, 1, norms)


def _base64(vectors: np.ndarray) -> list[str]:
    return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]


def _json(content: dict[str, Any]) -> Response:
    return Response(to_json(content), media_type="application/json")
