"""What an embedding server needs of a model. The command hands it in, for a part imports no part."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

TEXT, IMAGE = "text", "image"


class Tokens(Protocol):
    """A text as the model reads it."""

    token_ids: np.ndarray
    truncated: bool


class Embedder(Protocol):
    """A model. `computing` and `embed` are for one thread, the others for any."""

    dim: int
    vocabulary_size: int
    max_length: int | None
    takes_tokens: bool
    """Whether token ids may be given in place of texts."""
    takes_images: bool
    facts: dict[str, Any]

    def pieces_of(self, texts: Sequence[str]) -> list[Any]:
        """`Tokens` of each text."""

    def batch(self, lengths: Sequence[int]) -> list[int]:
        """Which of the inputs of these lengths are embedded together now, the first among them."""

    def computed_tokens(self, kind: str, lengths: Sequence[int]) -> int:
        """Tokens that a batch of these lengths is computed with, padding included."""

    def computing(self) -> AbstractContextManager[None]:
        """Surrounds all calls of `embed`."""

    def embed(self, kind: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """kind: TEXT or IMAGE. Returns (n, dim) float32."""


class ImageEmbedder(Embedder, Protocol):
    """A model that also takes images."""

    def pixels_of(self, data: bytes) -> np.ndarray:
        """An image file as the model takes it. Raises InputError for what is none."""

    def image_length(self) -> int:
        """Tokens that an image counts as."""
