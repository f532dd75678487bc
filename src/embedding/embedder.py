"""Vectors of a few texts or images at a time, for as long as a server runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from src.embedding.backends import Backend, load_local
from src.embedding.batching import batch_of_first, stepped_width
from src.embedding.encoder import Batch, BatchEncoder
from src.embedding.image_text import ImageTextModel, image_text_folder, load_image_text
from src.embedding.records import Piece
from src.embedding.settings import EmbedderSettings
from src.models.devices import resolve_device

TEXT = "text"


class TextEmbedder:
    """A sentence-transformers model by the encoder of `src.embed_dataset`: the same vectors, rounding apart."""

    takes_images = False

    def __init__(self, backend: Backend) -> None:
        (encoder,) = backend.encoders
        assert isinstance(encoder, BatchEncoder), type(encoder)
        self._encoder, self._pieces_of = encoder, backend.pieces_of
        self.dim, self.vocabulary_size = encoder.dim, encoder.vocabulary_size
        self.max_length: int | None = backend.facts["max_length"]
        self.takes_tokens = not backend.facts["prompt"]
        self.facts: dict[str, Any] = {**backend.facts, "device": backend.device, "dim": encoder.dim}

    def pieces_of(self, texts: Sequence[str]) -> list[Piece]:
        """Token ids of each text, the prompt before it, cut off where the model reads no further. Any thread may."""
        return self._pieces_of(texts)

    def batch(self, lengths: Sequence[int]) -> list[int]:
        """Which of the texts that wait are embedded now, the first among them; lengths: their tokens."""
        return batch_of_first(lengths, self._encoder.tokens_per_batch)

    def computing(self) -> AbstractContextManager[None]:
        """Within it, in one thread, `embed` may be called."""
        return self._encoder.computing()

    def embed(self, kind: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """inputs: (n_tokens,) token ids of each text. Returns (n, dim) float32."""
        assert kind == TEXT, kind
        pieces = [Piece(n, 0, ids, truncated=False) for n, ids in enumerate(inputs)]
        width = stepped_width(max(len(ids) for ids in inputs), len(inputs), self.max_length)
        return self._encoder.embed(Batch(pieces, width, self._encoder.pad_id, self._encoder.pads_left))


def load_embedder(settings: EmbedderSettings) -> "TextEmbedder | ImageTextModel":
    """
    What the reference means: a CLIP model, of which texts and images have vectors in one space, or a
    sentence-transformers model. Raises InputError as `load_backend`.
    """
    device = resolve_device(settings.device)
    folder = image_text_folder(settings.model_id, settings.revision)
    if folder is not None:
        return load_image_text(folder, settings, device)
    return TextEmbedder(load_local(settings, [device]))
