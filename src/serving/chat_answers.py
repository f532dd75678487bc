"""From the pieces of answers to the bodies and chunks of OpenAI's protocol."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.common.jsonl import round_measured
from src.models.async_pieces import AsyncEngine, Piece
from src.models.thinking import ThinkingReader
from src.models.types import GenerationRequest, GenerationResult
from src.serving.chat_captures import summary
from src.serving.chat_prompts import Asked
from src.serving.chat_text import AnswerText

Decode = Callable[[Sequence[int]], str]


@dataclass
class News:
    """What one piece added to a choice."""

    content: str = ""
    thinking: str = ""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    """Of each token its id, the text that it added, entropy and top-k mass."""


class Choice:
    """One of the answers to a request."""

    def __init__(self, index: int, asked: Asked, decode: Decode, reader: ThinkingReader, stops: Sequence[str]) -> None:
        self.index = index
        self._asked = asked
        self._reader = reader if asked.is_chat else None
        self._text = AnswerText(decode, self._reader, asked.header, stops)
        self._said = News()
        self._result: GenerationResult | None = None

    @property
    def is_over(self) -> bool:
        return self._result is not None or self._text.is_stopped

    @property
    def finish_reason(self) -> str | None:
        if self._text.is_stopped:
            return "stop"
        return self._result.finish_reason if self._result else None

    @property
    def n_tokens(self) -> int:
        """How many were generated."""
        return len(self._said.tokens)

    @property
    def tokens(self) -> list[dict[str, Any]]:
        return self._said.tokens

    @property
    def n_thinking_tokens(self) -> int:
        return sum(token["is_thinking"] for token in self._said.tokens)

    def add(self, piece: Piece) -> News:
        """What a piece adds; nothing more comes once the choice is over."""
        news = News()
        for token, entropy, mass in zip(piece.token_ids, piece.entropy, piece.top_k_mass, strict=True):
            if self._text.is_stopped:
                break
            part = self._text.add(token)
            news.content += part.content
            news.thinking += part.thinking
            news.tokens.append(
                {
                    "token_id": token, "text": part.content or part.thinking, "entropy": round_measured(entropy),
                    "top_k_mass": round_measured(mass), "is_thinking": self._text.is_thinking,
                }
            )  # fmt: skip
        if piece.result:
            self._result = piece.result
            part = self._text.rest()
            news.content += part.content
            news.thinking += part.thinking
            last = (news.tokens or self._said.tokens)[-1:]
            for token in last:
                token["text"] += part.content or part.thinking
        self._said.content += news.content
        self._said.thinking += news.thinking
        self._said.tokens += news.tokens
        return news

    def whole(self) -> tuple[str, str | None]:
        """(answer, thinking) when the choice is over."""
        if self._result is None or self._text.is_stopped:
            return self._said.content, self._said.thinking or None
        if self._reader is None:
            return self._result.text, None
        span = self._reader.read(self._result.token_ids, self._asked.header)
        return span.response, span.thinking

    def capture(self) -> list[dict[str, Any]]:
        """What is told of the hidden states that were kept."""
        assert self._result is not None
        return summary(self._result, self._asked.onto)


async def merged(
    engine: AsyncEngine, requests: Sequence[GenerationRequest], top_k: int, is_over: Callable[[int], bool]
) -> AsyncIterator[tuple[int, Piece]]:
    """
    The pieces of several answers as they come, each with its answer's number; of one that is over none. Closing the
    iterator drops all of them. Raises what the engine raises for any.
    """
    streams = [engine.stream(request, top_k) for request in requests]
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                yield i, task.result()
                if is_over(i):
                    await streams[i].aclose()
                else:
                    waiting[asyncio.ensure_future(anext(streams[i]))] = i
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


class Protocol:
    """Bodies and chunks of one request's answers, of chat or of raw completions."""

    def __init__(self, name: str, model: str, asked: Asked, *, uncertainty: bool, captures: bool) -> None:
        self._asked, self._uncertainty, self._captures = asked, uncertainty, captures
        self._head = {"id": name, "created": int(time.time()), "model": model}
        self._kind = "chat.completion" if asked.is_chat else "text_completion"

    def body(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """A whole answer."""
        return {
            **self._head, "object": self._kind, "choices": [self._choice(each) for each in choices],
            "usage": self.usage(choices), "tiller": self._asked.facts,
        }  # fmt: skip

    def opening(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The first chunk of a streamed answer: who speaks, and what was done."""
        deltas = [self._chunk_choice(each, {"role": "assistant", "content": ""}, None) for each in choices]
        return {**self._chunk_head(), "choices": deltas, "tiller": self._asked.facts}

    def chunk(self, choice: Choice, news: News) -> dict[str, Any] | None:
        """What is new of a choice; None for nothing."""
        if not (news.content or news.thinking or (self._uncertainty and news.tokens)):
            return None
        delta = {"content": news.content} if news.content or not news.thinking else {}
        delta |= {"reasoning_content": news.thinking} if news.thinking else {}
        added = self._chunk_choice(choice, delta, None)
        return {**self._chunk_head(), "choices": [added | ({"uncertainty": news.tokens} if self._uncertainty else {})]}

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk with a choice's finish reason."""
        added = self._chunk_choice(choice, {}, choice.finish_reason)
        return {**self._chunk_head(), "choices": [added | ({"capture": choice.capture()} if self._captures else {})]}

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {**self._chunk_head(), "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Tokens; those of a prompt count once, however many answers it has."""
        n_prompt = sum(len(request.token_ids) for request in self._asked.requests[:: self._asked.n])
        n_answer = sum(choice.n_tokens for choice in choices)
        n_thinking = sum(choice.n_thinking_tokens for choice in choices)
        return {
            "prompt_tokens": n_prompt, "completion_tokens": n_answer, "total_tokens": n_prompt + n_answer,
            "completion_tokens_details": {"reasoning_tokens": n_thinking},
        }  # fmt: skip

    def _choice(self, choice: Choice) -> dict[str, Any]:
        content, thinking = choice.whole()
        if self._asked.is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            text = {"message": message | ({"reasoning_content": thinking} if thinking is not None else {})}
        else:
            text = {"text": content}
        more = {"uncertainty": choice.tokens} if self._uncertainty else {}
        more |= {"capture": choice.capture()} if self._captures else {}
        return {
            "index": choice.index, **text, "finish_reason": choice.finish_reason, "logprobs": None, **more,
        }  # fmt: skip

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._asked.is_chat else self._kind}

    def _chunk_choice(self, choice: Choice, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        text = {"delta": delta} if self._asked.is_chat else {"text": delta.get("content", "")}
        return {"index": choice.index, **text, "finish_reason": finish_reason, "logprobs": None}
