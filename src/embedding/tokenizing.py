"""Texts to pieces of token ids: a shard at once, by a tokenizer of our own that truncates or cuts into chunks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from src.common.errors import InputError
from src.embedding.records import Piece

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

TEXTS_AT_ONCE = 512
Span = tuple[int, int]
"""Of a text: its first character, and the one after its last."""


class PieceTokenizer:
    """A copy of a model's fast tokenizer with limits of its own, so that a thread can use it beside the model."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompt: str,
        max_length: int | None,
        chunk_tokens: int | None = None,
        chunk_overlap: int = 0,
    ) -> None:
        """
        prompt: put before every text and every chunk. max_length: tokens of a piece at most, special ones included;
        None is no limit. A chunk is embedded as a text of its own, so that its stored text gives its vector again.
        Raises InputError for a tokenizer without a fast form, for chunks longer than max_length, and where special
        tokens and prompt, for chunks with the overlap, leave no room for text.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise InputError("--model_id: its tokenizer has no fast form (tokenizer.json); choose a model that has")
        self._prompt = prompt
        self._tokenizer = _copy(tokenizer)
        self._ends_in_special = frozenset(tokenizer.all_special_ids)
        n_prompt = len(self._tokenizer.encode(prompt).ids)
        if max_length is not None and n_prompt >= max_length:
            raise InputError(
                f"--max_length {max_length}: special tokens and prompt are {n_prompt} and leave no room for text"
            )
        self._splitter, self._chunk_tokens, self._overlap = None, chunk_tokens, chunk_overlap
        if chunk_tokens is not None:
            if max_length is not None and chunk_tokens > max_length:
                raise InputError(f"--chunk_tokens {chunk_tokens}: the model takes {max_length} tokens at most")
            content = chunk_tokens - n_prompt
            if content <= chunk_overlap:
                raise InputError(
                    f"--chunk_tokens {chunk_tokens}: special tokens, prompt and --chunk_overlap {chunk_overlap} leave "
                    f"no room for text; expected at least {chunk_tokens - content + chunk_overlap + 1}"
                )
            self._splitter, self._content = _copy(tokenizer), content
        if max_length is not None:
            self._tokenizer.enable_truncation(max_length, direction=tokenizer.truncation_side)

    def pieces(self, texts: Sequence[str]) -> list[Piece]:
        """The pieces of all texts in their order; exactly one a text unless it is cut into chunks."""
        found = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            part = texts[first : first + TEXTS_AT_ONCE]
            if self._splitter is None:
                spans = [[(0, len(text))] for text in part]
            else:
                self._splitter.enable_truncation(self._content, stride=self._overlap)
                spans = [self._spans(text) for text in part]
            encodings = iter(
                self._encoded([(text, each) for text, own in zip(part, spans, strict=True) for each in own])
            )
            for number, (text, own) in enumerate(zip(part, spans, strict=True), start=first):
                chunks = self._fitting(text, [(each, next(encodings)) for each in own])
                found += [
                    Piece(number, index, np.array(encoding.ids, dtype=np.int32), bool(encoding.overflowing), *each)
                    for index, (each, encoding) in enumerate(chunks)
                ]
        return found

    def _encoded(self, spans: Sequence[tuple[str, Span]]) -> "list[Encoding]":
        """The tokens of each span of its text, prompt included."""
        return self._tokenizer.encode_batch_fast([self._prompt + text[start:stop] for text, (start, stop) in spans])

    def _spans(self, text: str) -> list[Span]:
        """The chunks of a text."""
        assert self._splitter is not None
        encoding = self._splitter.encode(text, add_special_tokens=False)
        chunks = [each.offsets for each in (encoding, *encoding.overflowing) if each.offsets]
        if len(chunks) < 2:
            return [(0, len(text))]
        starts = [0, *(offsets[0][0] for offsets in chunks[1:])]
        stops = [*(offsets[-1][1] for offsets in chunks[:-1]), len(text)]
        return list(zip(starts, stops, strict=True))

    def _fitting(self, text: str, chunks: "list[tuple[Span, Encoding]]") -> "list[tuple[Span, Encoding]]":
        """
        The chunks, or shorter ones: by itself a chunk can have more tokens than it had within its text, as where it
        begins in the middle of what is one token there.
        """
        if self._splitter is None:
            return chunks
        for content in range(self._content - 1, self._overlap, -1):
            if all(len(encoding.ids) <= self._chunk_tokens and not encoding.overflowing for _, encoding in chunks):
                break
            self._splitter.enable_truncation(content, stride=self._overlap)
            spans = self._spans(text)
            chunks = list(zip(spans, self._encoded([(text, each) for each in spans]), strict=True))
        return chunks

    def prompt_length(self) -> int:
        """The prompt's tokens, a special one at the end not counted, as sentence-transformers counts them."""
        ids = self._tokenizer.encode(self._prompt).ids
        return len(ids) - (1 if ids and ids[-1] in self._ends_in_special else 0)


def _copy(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer":
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
