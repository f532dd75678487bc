"""Where an answer's thinking ends, by the marks that the model's own tokenizer and template know."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

# (start, end) as models write them; the end is what parts thinking from answer.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)


@dataclass(frozen=True, kw_only=True)
class ThinkingSpan:
    """How a response divides; counts are of generated tokens."""

    num_tokens: int
    """Leading tokens that are thinking, the end mark included."""
    end_position: int | None
    """Index of the token that completes the end mark; None when there is no such token."""
    truncated: bool
    """Whether thinking began and never ended, so that there is no answer."""
    thinking: str | None
    """Text of the thinking without its marks, None when there was none."""
    response: str
    """Text of the answer, empty when the thinking was cut off."""


class ThinkingReader:
    """
    Divides responses of one model. Models that know no marks never think.

    Where a mark is one token of the tokenizer only that token counts; other marks are looked for in the text, and there
    a start mark counts at the response's beginning only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def marks(self) -> tuple[str, str] | None:
        """The (start, end) that this tokenizer has as tokens or its template writes; None when it knows none."""
        template = self.tokenizer.chat_template or ""
        if isinstance(template, dict):
            template = template.get("default", "")
        for start, end in MARKS:
            if end in self._added or end in template:
                return start, end
        return None

    def is_opened_by(self, header: str) -> bool:
        """Whether a prompt that ends with `header` has the answer begin inside of thinking."""
        return self.marks is not None and header.rfind(self.marks[0]) > header.rfind(self.marks[1])

    def read(self, token_ids: Sequence[int], header: str) -> ThinkingSpan:
        """
        Divide one response. header: what the prompt ends with, which for some templates already opens the thinking,
        and for others opens and closes it: an end mark without a start mark is then part of the answer.

        A response is thinking up to the last end mark that closes something, and all of it when thinking that the
        prompt or the response opened is not closed. Without marks it is all answer.
        """
        if self.marks is None:
            return self._span(token_ids, 0)
        start, end = self.marks
        done = 0
        inside = self.is_opened_by(header)
        if not inside and end not in header:
            # Models trained to think without a start mark write the end mark alone.
            first_start, first_end = self._after(token_ids, start, 0), self._after(token_ids, end, 0)
            if first_end and (first_start is None or first_end < first_start):
                done = first_end
        while True:
            begun = done if inside else self._after_start(token_ids, done)
            if begun is None:
                return self._span(token_ids, done)
            ended = self._after(token_ids, end, begun)
            if ended is None:
                return self._span(token_ids, len(token_ids), truncated=True)
            done, inside = ended, False

    @cached_property
    def _added(self) -> dict[str, int]:
        return self.tokenizer.get_added_vocab()

    def _after_start(self, token_ids: Sequence[int], begin: int) -> int | None:
        start = self.marks[0]
        if start not in self._added and (begin > 0 or not self._raw(token_ids).lstrip().startswith(start)):
            return None
        return self._after(token_ids, start, begin)

    def _after(self, token_ids: Sequence[int], mark: str, begin: int) -> int | None:
        """Number of leading tokens up to and with the first `mark` at or after index `begin`; None without one."""
        if mark in self._added:
            places = (i + 1 for i in range(begin, len(token_ids)) if token_ids[i] == self._added[mark])
            return next(places, None)
        if mark not in self._raw(token_ids[begin:]):
            return None
        # A longer prefix never loses the mark again, hence the bisection.
        low, high = begin + 1, len(token_ids)
        while low < high:
            middle = (low + high) // 2
            if mark in self._raw(token_ids[begin:middle]):
                high = middle
            else:
                low = middle + 1
        return low

    def _span(self, token_ids: Sequence[int], n: int, truncated: bool = False) -> ThinkingSpan:
        began = n > 0 or truncated
        response = self._text(token_ids[n:])
        return ThinkingSpan(
            num_tokens=n,
            end_position=n - 1 if began and not truncated else None,
            truncated=truncated,
            thinking=self._thinking_text(token_ids[:n]) if began else None,
            response=response.lstrip("\n") if began else response,
        )

    def _raw(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _thinking_text(self, token_ids: Sequence[int]) -> str:
        # A model with channels writes a header of its own between thinking and answer.
        text = re.sub(r"<\|start\|>[^<]*", "", self._raw(token_ids))
        special = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        for literal in (*self.marks, *special):
            text = text.replace(literal, "")
        return text.strip()
