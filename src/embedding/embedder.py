"""Vectors of a few texts or images at a time, for as long as a server runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from src.embedding.backends import Backend, load_local
from src.embedding.batching import batch_of_first, batch_without_padding, stepped_tokens, stepped_width
from src.embedding.encoder import Batch, BatchEncoder, TorchEncoder
from src.embedding.image_text import ImageTextModel, image_text_folder, load_image_text
from src.embedding.records import Piece
from src.embedding.settings import EmbedderSettings
from src.embedding.trial import trial_pieces
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
        self._is_unpadded = isinstance(encoder, TorchEncoder) and self._leaves_padding_out(encoder)
        facts = {"device": backend.device, "dim": encoder.dim, "unpadded": self._is_unpadded}
        self.facts: dict[str, Any] = {**backend.facts, **facts}

    def _leaves_padding_out(self, encoder: TorchEncoder) -> bool:
        with encoder.computing():
            return encoder.leave_padding_out(trial_pieces(encoder.vocabulary_size))

    def pieces_of(self, texts: Sequence[str]) -> list[Piece]:
        """Token ids of each text, the prompt before it, cut off where the model reads no further. Any thread may."""
        return self._pieces_of(texts)

    def batch(self, lengths: Sequence[int]) -> list[int]:
        """Which of the texts that wait are embedded now, the first among them; lengths: their tokens."""
        choose = batch_without_padding if self._is_unpadded else batch_of_first
        return choose(lengths, self._encoder.tokens_per_batch)

    def computed_tokens(self, kind: str, lengths: Sequence[int]) -> int:
        """Tokens that a batch of texts of these lengths is computed with, padding included."""
        assert kind == TEXT, kind
        if self._is_unpadded:
            return stepped_tokens(sum(lengths))
        return len(lengths) * self._width(lengths)

    def _width(self, lengths: Sequence[int]) -> int:
        return stepped_width(max(lengths), len(lengths), self.max_length)

    def computing(self) -> AbstractContextManager[None]:
        """Within it, in one thread, `embed` may be called."""
        return self._encoder.computing()

    def embed(self, kind: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """inputs: (n_tokens,) token ids of each text. Returns (n, dim) float32."""
        assert kind == TEXT, kind
        pieces = [Piece(n, 0, ids, truncated=False) for n, ids in enumerate(inputs)]
        lengths = [len(ids) for ids in inputs]
        if self._is_unpadded:
            return self._encoder.embed_unpadded(pieces, self.computed_tokens(kind, lengths))
        return self._encoder.embed(Batch(pieces, self._width(lengths), self._encoder.pad_id, self._encoder.pads_left))


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
