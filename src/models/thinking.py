"""Where an answer's thinking ends, by the marks that the model's own tokenizer and template know."""

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
    """Divides responses of one model. Models that know no marks never think."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def marks(self) -> tuple[str, str] | None:
        """The (start, end) that this tokenizer has as tokens or its template writes; None when it knows none."""
        known = set(self.tokenizer.get_added_vocab())
        template = self.tokenizer.chat_template or ""
        for start, end in MARKS:
            if end in known or end in template:
                return start, end
        return None

    def read(self, token_ids: Sequence[int], header: str) -> ThinkingSpan:
        """
        Divide one response. header: what the prompt ends with, which for some templates already opens the thinking.

        Without an end mark a response is all thinking when thinking was opened, by the prompt or by the response, and
        all answer when it was not.
        """
        if self.marks is None:
            return self._all_answer(token_ids)
        start, end = self.marks
        text = self._raw(token_ids)
        opened = header.rfind(start) > header.rfind(end) or text.lstrip().startswith(start)
        # A closed block in the prompt means an answer without thinking, which may well speak of the marks.
        if not opened and (end in header or end not in text):
            return self._all_answer(token_ids)
        if end in text:
            return self._divided(token_ids, text)
        return ThinkingSpan(
            num_tokens=len(token_ids),
            end_position=None,
            truncated=True,
            thinking=self._thinking_text(text),
            response="",
        )

    def _divided(self, token_ids: Sequence[int], text: str) -> ThinkingSpan:
        position = self._end_position(token_ids)
        return ThinkingSpan(
            num_tokens=position + 1,
            end_position=position,
            truncated=False,
            thinking=self._thinking_text(text),
            response=self._text(token_ids[position + 1 :]).lstrip("\n"),
        )

    def _end_position(self, token_ids: Sequence[int]) -> int:
        # A tokenizer without the mark as a token spells it in several, so the text decides. A longer prefix never
        # loses the mark again, hence the bisection.
        low, high = 0, len(token_ids) - 1
        while low < high:
            middle = (low + high) // 2
            if self.marks[1] in self._raw(token_ids[: middle + 1]):
                high = middle
            else:
                low = middle + 1
        return low

    def _all_answer(self, token_ids: Sequence[int]) -> ThinkingSpan:
        return ThinkingSpan(
            num_tokens=0, end_position=None, truncated=False, thinking=None, response=self._text(token_ids)
        )

    def _raw(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _thinking_text(self, raw: str) -> str:
        start, end = self.marks
        # gpt-oss ends the message of its thinking, then opens that of its answer with a header.
        text = raw.split(end)[0].split("<|end|>")[0].replace(start, "")
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text.strip()
