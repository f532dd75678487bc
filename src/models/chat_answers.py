"""
Answers as the tokens a model gives them with, for training: what the template writes behind the prompt that generation
sees, up to the token at which generation stops.
"""

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from src.common.errors import InputError
from src.models.chat_format_template import ChatTemplate
from src.models.chat_format_tokens import GuardedTokenizer, Segment
from src.models.thinking import MARKS

if TYPE_CHECKING:
    from src.models.chat_format import RenderedPrompt


def answer_ids(
    template: ChatTemplate, guard: GuardedTokenizer, prompt: "RenderedPrompt", answer: str, eos_ids: Collection[int]
) -> tuple[int, ...]:
    """As `PersonaRenderer.answer_ids`."""
    before = template.apply(prompt.messages)
    whole = template.apply([*prompt.messages, {"role": "assistant", "content": answer}], generation=False)
    if not whole.startswith(before):
        raise InputError(
            f"{template.name} writes an answer behind {_last(_shared(before, whole))!r}, and asks for one with "
            f"{_last(before)!r}: training would not see what generation sees; pass --chat_template FILE"
        )
    lead, written, tail = _parts(template, whole[len(before) :], answer)
    end = _end(template, guard, tail, eos_ids)
    answered = [(lead, True), *_answer_segments(guard, written), (end, True)]
    ids = guard.encode([*prompt.segments, *answered])
    n = len(prompt.token_ids)
    if ids[:n] == prompt.token_ids:
        return ids[n:]
    return _behind(guard, prompt, answered)


def _behind(guard: GuardedTokenizer, prompt: "RenderedPrompt", answered: list[Segment]) -> tuple[int, ...]:
    """
    The answer's own ids where the tokenizer cuts the prompt's end otherwise with an answer behind it, as byte-level
    ones cut line breaks: generation begins behind the prompt as it is cut alone.
    """
    ids = guard.encode(answered)
    ids = ids[len(guard.prefix) :] if guard.prefix and ids[: len(guard.prefix)] == tuple(guard.prefix) else ids
    text = "".join(part for part, _ in answered)
    if _decoded(guard, (*prompt.token_ids, *ids)) != _decoded(guard, prompt.token_ids) + text:
        raise InputError(
            f"the answer {text[:40]!r} has other tokens behind its prompt than alone, so that training would not see "
            f"what generation sees; strip the white space around the answer, or pass --chat_template FILE"
        )
    return ids


def _decoded(guard: GuardedTokenizer, ids: tuple[int, ...]) -> str:
    return guard.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _shared(first: str, second: str) -> str:
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    length = next(differing, min(len(first), len(second)))
    return second[: length + 40]


def _last(text: str) -> str:
    return text if len(text) <= 60 else f"…{text[-60:]}"


def _parts(template: ChatTemplate, rest: str, answer: str) -> tuple[str, str, str]:
    """What is written behind the prompt, as (white space, the answer with or without its own around it, the rest)."""
    blank = rest[: len(rest) - len(rest.lstrip())]
    for lead in dict.fromkeys(("", blank)):
        for written in dict.fromkeys((answer, answer.strip(), answer.lstrip(), answer.rstrip())):
            if rest.startswith(lead + written):
                return lead, written, rest[len(lead + written) :]
    raise InputError(
        f"{template.name} writes {rest[:60]!r} behind the prompt and not the answer {answer[:40]!r}: training would "
        f"not see what generation sees. Of a model that thinks first, take --no_thinking_mode for answers without "
        f"thoughts (there and when it generates), else pass --chat_template FILE"
    )


def _end(template: ChatTemplate, guard: GuardedTokenizer, tail: str, eos_ids: Collection[int]) -> str:
    """The text of the end-of-turn token that a template writes; the tokenizer's end of text where it writes none."""
    literals = sorted(guard.control.items(), key=lambda item: -len(item[1]))
    stripped = tail.lstrip()
    found = next(((token_id, literal) for token_id, literal in literals if stripped.startswith(literal)), None)
    if found is None and not stripped and guard.tokenizer.eos_token:
        return guard.tokenizer.eos_token
    if found is None or found[0] not in eos_ids:
        stops = ", ".join(sorted(repr(guard.tokenizer.convert_ids_to_tokens(i)) for i in eos_ids))
        raise InputError(
            f"{template.name} ends an answer with {tail[:40]!r}, and generation stops at {stops or 'no token'}: an "
            f"answer would never end; pass --chat_template FILE, or correct eos_token_id in generation_config.json"
        )
    return tail[: len(tail) - len(stripped)] + found[1]


def _answer_segments(guard: GuardedTokenizer, written: str) -> Iterator[Segment]:
    """The answer, the marks around the thinking that it begins with being the tokens that a model gives."""
    literals = set(guard.control.values())
    for start, end in MARKS:
        opened = re.match(rf"\s*{re.escape(start)}", written)
        # A template may open the thinking itself, as the last piece of the prompt.
        closed = written.find(end)
        if {start, end} <= literals and closed >= 0 and (opened or start not in written):
            n = opened.end() if opened else 0
            yield written[:n], True
            yield written[n:closed], False
            yield end, True
            yield written[closed + len(end) :], False
            return
    yield written, False
