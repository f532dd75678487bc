"""Conversations as token ids with labels: the ids that generation sees, and which of them are to be learned."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from src.common.errors import InputError
from src.models.chat_format import PersonaRenderer
from src.models.single_prompts import SinglePromptRenderer
from src.training.rows import Conversation, Message
from src.training.settings import PLACEHOLDER

IGNORED = -100
"""The label of a token that is not learned, as torch's cross entropy has it."""


@dataclass(frozen=True)
class Example:
    """A sequence to learn from."""

    place: str
    """`file:line` of its row."""
    token_ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    """[start, end) of each answer's tokens, the one that ends it included."""
    rejected_ids: tuple[int, ...] = ()
    """Of preferences: the tokens of the other answer, which would stand where the last answer does."""

    def labels(self, train_on: str) -> list[int]:
        """
        For each token its id where it is learned, else IGNORED. train_on: `completions` (the answers) or `all`, which
        leaves out the first token, since nothing stands before it.
        """
        spans = self.answers if train_on == "completions" else [(0, len(self.token_ids))]
        labels = [IGNORED] * len(self.token_ids)
        for start, end in spans:
            labels[start:end] = self.token_ids[start:end]
        labels[0] = IGNORED
        return labels


class Format(Protocol):
    """How prompts and answers become ids."""

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids that generation would begin from."""

    def answer(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        """The ids of an answer to them, up to and with the one at which generation stops."""


class ChatFormat:
    """Through the chat template, as a persona or not."""

    def __init__(
        self, renderer: PersonaRenderer, eos_ids: Collection[int], persona: str | None = None, article: str = ""
    ) -> None:
        self._renderer, self._eos_ids = renderer, eos_ids
        self._persona = (persona, article)

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._renderer.render(messages, *self._persona).token_ids

    def answer(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        return self._renderer.answer_ids(self._renderer.render(messages, *self._persona), answer, self._eos_ids)


class RawFormat:
    """The texts themselves one after another, and the tokenizer's end of text."""

    def __init__(self, renderer: SinglePromptRenderer, eos_id: int | None) -> None:
        if eos_id is None:
            raise InputError("--raw_prompts: the tokenizer has no end-of-text token, so that no answer would ever end")
        self._renderer, self._eos_id = renderer, eos_id

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._ids(self._text(messages))

    def answer(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        prompt = self.prompt(messages)
        whole = self._ids(self._text(messages) + answer)
        if whole[: len(prompt)] != prompt:
            raise InputError(
                f"the answer {answer[:40]!r} shares a token with the prompt's end; begin it with a blank, or end the "
                f"prompt with a line break"
            )
        return (*whole[len(prompt) :], self._eos_id)

    def _ids(self, text: str) -> tuple[int, ...]:
        return self._renderer.rendered(text).token_ids

    @staticmethod
    def _text(messages: Sequence[Message]) -> str:
        if len(messages) != 1:
            raise InputError("--raw_prompts takes one prompt and one completion a row; this one has more messages")
        return messages[0]["content"]


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """What is put around the row's own texts."""

    prompt: str = PLACEHOLDER
    """What the first user message becomes, its text standing for {input}."""
    system_prompt: str | None = None

    def wrapped(self, conversation: Conversation) -> Conversation:
        """Raises InputError where the row has a system message of its own and another is given."""
        messages = list(conversation.messages)
        has_system = messages[0]["role"] == "system"
        if has_system and self.system_prompt is not None:
            raise InputError("it has a system message, and --system_prompt gives another; leave one of them out")
        first = 1 if has_system else 0
        # Braces in the data are data, hence no str.format.
        before, after = self.prompt.split(PLACEHOLDER)
        messages[first] = {"role": "user", "content": f"{before}{messages[first]['content']}{after}"}
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return replace(conversation, messages=tuple(messages))


def examples(conversation: Conversation, form: Format, wrapping: Wrapping) -> Iterator[Example]:
    """
    One sequence with all answers where every prompt is the beginning of the next; else, for templates that write
    earlier answers otherwise than they were given (Qwen3's leave thinking out), one sequence an answer.

    Raises InputError with the row's place for a row that cannot be rendered so that training sees what generation sees.
    """
    try:
        yield from _examples(wrapping.wrapped(conversation), form)
    except InputError as error:
        raise InputError(f"{conversation.place}: {error}") from error


def _examples(conversation: Conversation, form: Format) -> list[Example]:
    messages, place = conversation.messages, conversation.place
    at = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if conversation.rejected is not None:
        # Only the last answer is compared; those before it belong to the prompt.
        at = at[-1:]
    turns = [(form.prompt(messages[:i]), form.answer(messages[:i], messages[i]["content"])) for i in at]
    is_one = all(
        later[: len(prompt) + len(answer)] == (*prompt, *answer) for (prompt, answer), (later, _) in pairwise(turns)
    )
    rejected = () if conversation.rejected is None else form.answer(messages[: at[-1]], conversation.rejected)
    spans = [(len(prompt), len(prompt) + len(answer)) for prompt, answer in turns]
    if is_one:
        prompt, answer = turns[-1]
        return [Example(place, (*prompt, *answer), tuple(spans), rejected)]
    return [Example(place, (*prompt, *answer), (span,)) for (prompt, answer), span in zip(turns, spans, strict=True)]
