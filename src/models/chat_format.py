"""
Conversations as token ids, with a persona's name in every assistant header.

A render is made of the template's own pieces, the contents and the persona's name, and it is refused unless the pieces
and the contents alone are exactly the stock render. Only the template's pieces can give special tokens.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date

from transformers import PreTrainedTokenizerBase

from src.common.errors import InputError
from src.common.system_prompts import PLAIN, check_style, read_chat_template, system_prompt
from src.models.chat_answers import answer_ids
from src.models.chat_format_template import ChatTemplate, Layout, Message
from src.models.chat_format_tokens import GuardedTokenizer, Segment

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MODES = ("header", "system", "both")
STOCK_PERSONA = "assistant"


@dataclass(frozen=True, kw_only=True)
class RenderedPrompt:
    """A conversation up to where the assistant's next answer begins."""

    token_ids: tuple[int, ...]
    text: str
    persona_applied: str
    """What was done, read off the render: `header` and / or `system` (or `folded` into the first user turn) joined by
    `+`; `none` when the text is what the stock template writes of the same messages."""
    system_prompt: str | None
    """The whole system text, the conversation's own included; None when there is none but the template's."""
    header: str
    """What the template writes after the last message: the last assistant header, with its own role word."""
    segments: tuple[Segment, ...]
    """The text in parts, each with whether it is the template's own."""
    messages: tuple[Message, ...]
    """The conversation as the template got it, the persona's system prompt included."""


def with_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    """
    `tokenizer`, its template set to the text of a Jinja file, or to `plain`: "User: …", "Assistant: …".

    Raises InputError when the file cannot be read, and when there is no template at all (a base model).
    """
    if chat_template is not None:
        tokenizer.chat_template = PLAIN_TEMPLATE if chat_template == PLAIN else read_chat_template(chat_template)
    _source(tokenizer)
    return tokenizer


class PersonaRenderer:
    """
    Renders conversations for one tokenizer, its template analysed once.

    mode: `header` puts the persona's name into every assistant header, `system` into the system prompt, `both` does
    both. today: what templates that write the date write, so that a run that goes on tomorrow asks what it asked today.
    Raises InputError when the template gives no header that can be proven to carry the name.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mode: str = "both",
        *,
        system_prompt_style: str = "you-are-a",
        thinking: bool = True,
        today: date | None = None,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"--persona_mode {mode}: expected {', '.join(MODES)}")
        check_style(system_prompt_style)
        self.tokenizer = tokenizer
        self.mode = mode
        self.style = system_prompt_style
        self.thinking = thinking
        source = _source(tokenizer)
        self._template = ChatTemplate(tokenizer, source, thinking, today or date.today())
        self._guard = GuardedTokenizer(tokenizer, source)
        if mode != "system":
            # Refuse before anything is generated, earlier headers included.
            question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}
            self._template.role_places(self._template.written([question, answer, question])[0])

    @property
    def role_word(self) -> str:
        """What the template calls the assistant in its headers. Raises InputError when there is no such word."""
        return self._template.role_word

    def render(
        self, messages: str | Sequence[Message], persona: str | None = None, article: str = ""
    ) -> RenderedPrompt:
        """
        messages: one question, or {"role", "content"} of user and assistant in turn, the user first and last, after a
        system message if there is one: the persona's system prompt then goes before its text. persona: None and
        `assistant` leave the headers alone, None the system prompt too.

        Raises InputError for other messages, for an empty persona, and for a render that cannot be proven to carry it.
        """
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        _check_roles(messages)
        if persona is not None and not persona.strip():
            raise InputError("the persona is empty; expected a name")
        own = self._system_of_persona(persona, article)
        messages, system, how = self._with_system(messages, own)
        layout, contents = self._template.written(messages)
        places = self._places(layout, persona)
        segments = list(_segments(layout.pieces, contents, places, persona))
        done = [*(["header"] if places else []), *([how] if own is not None else [])]
        return RenderedPrompt(
            token_ids=self._guard.encode(segments),
            text="".join(part for part, _ in segments),
            persona_applied="+".join(done) or "none",
            system_prompt=system,
            header=layout.pieces[-1],
            segments=tuple(segments),
            messages=tuple(messages),
        )

    def answer_ids(self, prompt: RenderedPrompt, answer: str, eos_ids: Collection[int]) -> tuple[int, ...]:
        """
        The tokens with which a model gives `answer` to a prompt of this renderer, up to and with the one that ends it.

        eos_ids: the tokens at which generation stops. Raises InputError where the template does not write the answer
        right behind the prompt, ends it otherwise, or where both together have other tokens than the prompt alone.
        """
        return answer_ids(self._template, self._guard, prompt, answer, eos_ids)

    def stock(self, messages: Sequence[Message]) -> str:
        """What the template itself writes of `messages`, the generation prompt included."""
        return self._template.apply(messages)

    def _system_of_persona(self, persona: str | None, article: str) -> str | None:
        if persona is None or self.mode == "header":
            return None
        system = system_prompt(persona, article, self.style)
        if system is None and self.mode == "system" and persona != STOCK_PERSONA:
            raise InputError(
                f"--persona_mode system with --system_prompt_style none leaves nothing that carries {persona!r}; "
                f"use --persona_mode header, or a style"
            )
        return system

    def _with_system(self, messages: list[Message], own: str | None) -> tuple[list[Message], str | None, str]:
        """The messages with one system text, written by the template if it takes one; the text; where it went."""
        given, rest = ([messages[0]["content"]], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
        parts = [text for text in (own, *given) if text is not None]
        if not parts:
            return rest, None, "none"
        system = "\n\n".join(parts)
        if self._template.takes_system:
            return [{"role": "system", "content": system}, *rest], system, "system"
        return [{"role": "user", "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]], system, "folded"

    def _places(self, layout: Layout, persona: str | None) -> dict[int, list[tuple[int, int]]]:
        """Piece → [start, end) of the role words that give way to the persona's name."""
        if self.mode == "system" or persona in (None, STOCK_PERSONA, self.role_word):
            return {}
        return self._template.role_places(layout)


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template; of several the one named `default`."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template (a base model?); "
            f"pass --chat_template FILE, or --chat_template plain"
        )
    return source


def _check_roles(messages: Sequence[Message]) -> None:
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise InputError(
            f"the roles of a conversation are {', '.join(roles) or 'missing'}; expected user and assistant in turn, "
            f"the user first and last, after at most one system message"
        )


def _segments(
    pieces: Sequence[str], contents: Sequence[str], places: dict[int, list[tuple[int, int]]], persona: str | None
) -> Iterator[Segment]:
    """The text in order, each part with whether it is the template's own."""
    for i, piece in enumerate(pieces):
        position = 0
        for start, end in places.get(i, ()):
            yield piece[position:start], True
            yield persona, False
            position = end
        yield piece[position:], True
        if i < len(contents):
            yield contents[i], False
