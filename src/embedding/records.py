"""What passes between the stages of an embedding run."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class TextRow:
    """A row of the dataset with its text."""

    row_index: int
    id: str
    source: str
    text: str
    metadata: str
    """The row's other fields as JSON."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is embedded: a text, the beginning of one that is too long, or a chunk of it."""

    text: int
    """Which of the shard's distinct texts it belongs to."""
    chunk_index: int
    token_ids: np.ndarray | None
    """(n_tokens,) int32, special tokens included; None where a server has the tokenizer."""
    truncated: bool
    start: int = 0
    """Where its characters begin in the text."""
    stop: int | None = None
    """Where they end; None is the text's end."""


@dataclass(kw_only=True)
class Shard:
    """A range of the dataset's rows, from reading to writing."""

    index: int
    row_start: int
    row_stop: int
    is_last: bool
    rows: list[TextRow]
    bad_rows: int
    sampled_out: int
    texts: list[str] = field(default_factory=list)
    """The distinct texts, the prompt not included."""
    text_of_row: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    """In the order of the texts, the chunks of one in a row."""
    embeddings: np.ndarray | None = None
    """(n_pieces, dim) float32."""
    padded_tokens: int = 0
    """Tokens that were computed, padding included."""
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage → {"busy", "idle"}."""
