"""An answer's text as its tokens come: thinking and answer apart, up to the first of the strings that end it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from src.models.streaming import TextStream
from src.models.thinking import ThinkingReader


class Part(NamedTuple):
    """Text that is new with one token; one of the two is always empty."""

    content: str = ""
    thinking: str = ""


class AnswerText:
    """The text of one answer. Its parts together are what `whole_text` makes of all tokens."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], reader: ThinkingReader | None, header: str, stops: Sequence[str]
    ) -> None:
        """
        reader: None for raw completions, which know no thinking. header: what the prompt ends with. stops: strings that
        end the answer; they are looked for in the answer itself, not in its thinking.
        """
        self._decode, self._reader, self._header, self._stops = decode, reader, header, tuple(stops)
        self._tokens: list[int] = []
        self._stream = TextStream(decode)
        self.is_thinking = False
        """Whether the last token was part of the thinking."""
        self._is_blank = False
        self._held = ""
        self.is_stopped = False
        """Whether one of the strings has ended the answer; nothing comes after it."""

    def add(self, token: int) -> Part:
        """What may be shown with this token."""
        if self.is_stopped:
            return Part()
        self._tokens.append(token)
        inside = self._is_inside()
        if inside and not self.is_thinking:
            self._stream = TextStream(self._decode)
        if self.is_thinking and not inside:
            # The answer begins: line breaks between it and the thinking belong to neither.
            self._stream, self._is_blank = TextStream(self._decode), True
        self.is_thinking = inside
        text = self._stream.add(token)
        if inside:
            return Part(thinking="" if self._ends_thinking(token) else text)
        return Part(content=self._up_to_stop(self._begun(text)))

    def rest(self) -> Part:
        """What was held back, at the end."""
        if self.is_stopped:
            return Part()
        text = self._stream.rest()
        if self.is_thinking:
            return Part(thinking=text)
        shown = self._up_to_stop(self._begun(text))
        held, self._held = ("", "") if self.is_stopped else (self._held, "")
        return Part(content=shown + held)

    def _is_inside(self) -> bool:
        if self._reader is None or self._reader.marks is None:
            return False
        return self._reader.read(self._tokens, self._header).num_tokens == len(self._tokens)

    def _ends_thinking(self, token: int) -> bool:
        return self._decode([token]).strip() in self._reader.marks

    def _begun(self, text: str) -> str:
        if not self._is_blank:
            return text
        text = text.lstrip("\n")
        self._is_blank = not text
        return text

    def _up_to_stop(self, text: str) -> str:
        """What of the held text and the new one is sure to stay."""
        self._held += text
        begins = [i for i in (self._held.find(stop) for stop in self._stops) if i >= 0]
        if begins:
            self.is_stopped = True
            return self._held[: min(begins)]
        n_held = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - n_held], self._held[len(self._held) - n_held :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of a stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
