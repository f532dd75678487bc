"""
What a chat template writes around the messages, and where its assistant headers name the role.

Everything is read off what the template writes, never off its source: contents are replaced by markers, so that what
stands between the markers is known to be the template's own.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import date
from functools import cached_property, lru_cache
from typing import NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from src.common.errors import InputError
from src.models.thinking import MARKS

# A word of no template, and nothing that a template tests for.
MARKER = "zqx{}marker{}xqz"
WORD = re.compile(r"[^\W\d_](?:[\w-]*\w)?")
REMEDY = "use --persona_mode system, which names the persona in the system prompt only"
Message = dict[str, str]
Shape = tuple[tuple[str, str | None], ...]
"""Per message its role and, where it is blank, its content: templates may treat a blank message differently."""


class Layout(NamedTuple):
    """What a template writes of conversations of one shape."""

    pieces: tuple[str, ...]
    """The template's own text before, between and after the contents; blank contents are part of it."""
    slots: tuple[int, ...]
    """Index of the message whose content follows each piece but the last."""
    answers: tuple[int, ...]
    """Index of the piece that ends in each assistant header, the one of the answer to come last."""


class ChatTemplate:
    """One tokenizer's chat template with its settings; shapes of conversations are analysed once each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, thinking: bool, today: date) -> None:
        self.tokenizer = tokenizer
        self.name = f"the chat template of {tokenizer.name_or_path or type(tokenizer).__name__}"
        self._source = source
        # The same wish under the names that templates know it by; and a date that does not change at midnight.
        self._variables = {"enable_thinking": thinking, "thinking": thinking, "strftime_now": today.strftime}
        self._layout = lru_cache(maxsize=256)(self._layout_of_shape)
        self.role_places = lru_cache(maxsize=256)(self._role_places)

    def apply(self, messages: Sequence[Message], generation: bool = True, as_parts: bool | None = None) -> str:
        """The stock render. Raises InputError when the template refuses the messages."""
        chat: list[dict] = list(messages)
        if self._content_is_parts if as_parts is None else as_parts:
            chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                chat, chat_template=self._source, tokenize=False, add_generation_prompt=generation, **self._variables
            )
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise InputError(f"{self.name} does not write the conversation {roles}: {error}") from error

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message is written, once, and leaves the user's where it was."""
        markers = [MARKER.format(i, i) for i in range(2)]
        messages = [{"role": "system", "content": markers[0]}, {"role": "user", "content": markers[1]}]
        try:
            text = self.apply(messages)
        except (InputError, TypeError):
            return False
        return all(text.count(marker) == 1 for marker in markers)

    def written(self, messages: Sequence[Message]) -> tuple[Layout, list[str]]:
        """
        The layout of `messages` and the contents of its slots as the template writes them, many without the white
        space around. Pieces and contents in turn are the stock render.

        Raises InputError when the render is not made of them.
        """
        text = self.apply(messages)
        layout = self._layout(tuple((m["role"], None if m["content"].strip() else m["content"]) for m in messages))
        contents = [messages[i]["content"] for i in layout.slots]
        written = _match(text, layout.pieces, contents)
        if written is None:
            written = _only_match(text, layout.pieces, contents)
        if written is None:
            raise InputError(
                f"{self.name} changes a message's text in a way that cannot be followed, in the conversation that "
                f"begins {messages[0]['content'][:60]!r}; take marks such as <think> out of its messages, or pass "
                f"--chat_template FILE"
            )
        return layout, written

    @cached_property
    def role_word(self) -> str:
        """
        The word that names the assistant in its headers: the one word of the generation prompt that the header of a
        user's later turn does not hold.

        Raises InputError when there is none, when it is part of a token, or when there are several.
        """
        prompt = self._generation_prompt
        between = self._layout(tuple((role, None) for role in ("user", "assistant", "user")))
        of_user = set(self._words(between.pieces[2]))
        words = [word for word in dict.fromkeys(self._words(prompt)) if word not in of_user]
        if len(words) == 1:
            return words[0]
        if words:
            problem = f"is one of several words ({', '.join(words)})"
        else:
            problem = "lies inside a special token" if WORD.search(prompt) else "does not exist"
        raise InputError(
            f"{self.name}: the role word of its assistant header {prompt!r} {problem}, so it cannot carry a persona; "
            f"{REMEDY}"
        )

    def _role_places(self, layout: Layout) -> dict[int, list[tuple[int, int]]]:
        """Piece → [start, end) of every role word in it. Raises InputError unless each header has exactly one."""
        word = self.role_word
        found = {}
        for index in dict.fromkeys(layout.answers):
            piece, expected = layout.pieces[index], layout.answers.count(index)
            found[index] = [m.span() for m in self._words_with_places(piece) if m.group() == word]
            n = len(found[index])
            if n < expected:
                raise InputError(f"{self.name} writes no {word!r} where an answer begins ({piece!r}); {REMEDY}")
            if n > expected:
                raise InputError(f"{self.name} writes {word!r} {n} times for {expected} header in {piece!r}; {REMEDY}")
        return found

    @cached_property
    def _content_is_parts(self) -> bool:
        # Templates of multimodal models may only take a list of parts.
        marker, problem = MARKER.format(0, 0), "it leaves the text out"
        for as_parts in (False, True):
            try:
                if marker in self.apply([{"role": "user", "content": marker}], as_parts=as_parts):
                    return as_parts
            except (InputError, TypeError) as error:
                problem = str(error)
        raise InputError(
            f"{self.name} does not write a user's message ({problem}); pass another with --chat_template FILE"
        )

    @cached_property
    def _generation_prompt(self) -> str:
        message = [{"role": "user", "content": MARKER.format(0, 0)}]
        without, whole = self.apply(message, generation=False), self.apply(message)
        shared = len(without)
        while not whole.startswith(without[:shared]):
            shared -= 1
        # Two tokens that begin alike, such as an end of sequence and a header, share their first characters.
        inside = [m.start() for m in self._token_pattern.finditer(whole) if m.start() < shared < m.end()]
        return whole[min([shared, *inside]) :]

    def _layout_of_shape(self, shape: Shape) -> Layout:
        markers = [MARKER.format(i, i) for i in range(len(shape))]
        messages = [
            {"role": role, "content": marker if blank is None else blank}
            for (role, blank), marker in zip(shape, markers, strict=True)
        ]
        text = self.apply(messages)
        slots = [i for i, (_, blank) in enumerate(shape) if blank is None]
        if any(text.count(markers[i]) != 1 for i in slots):
            roles = ", ".join(role for role, _ in shape)
            raise InputError(f"{self.name} drops or doubles one of the messages {roles}; pass --chat_template FILE")
        slots.sort(key=lambda i: text.index(markers[i]))
        pieces = re.split("|".join(markers), text)
        return Layout(tuple(pieces), tuple(slots), tuple(_header_pieces(shape, slots)))

    def _words_with_places(self, text: str) -> Iterator[re.Match[str]]:
        inside = [match.span() for match in self._token_pattern.finditer(text)]
        for match in WORD.finditer(text):
            if not any(start < match.end() and match.start() < end for start, end in inside):
                yield match

    def _words(self, text: str) -> list[str]:
        return [match.group() for match in self._words_with_places(text)]

    @cached_property
    def _token_pattern(self) -> re.Pattern[str]:
        """The literals of all added tokens, and the marks of thinking even where they are no tokens."""
        literals = {*self.tokenizer.get_added_vocab(), *(mark for marks in MARKS for mark in marks)}
        return re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True))))


def _header_pieces(shape: Shape, slots: list[int]) -> Iterator[int]:
    """The piece in which each answer's header stands: the one after the last content before it that is not blank."""
    roles = [role for role, _ in shape]
    for answer in [*(i for i, role in enumerate(roles) if role == "assistant"), len(roles)]:
        # A system text counts where it is written first, not where it goes with a later turn.
        before = [i for i in slots if i < answer and (roles[i] != "system" or slots[0] == i)]
        yield slots.index(max(before)) + 1 if before else 0


def _match(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[str] | None:
    """The contents as `text` holds them between `pieces`, each with or without its outer white space."""
    if not text.startswith(pieces[0]):
        return None
    rest = text[len(pieces[0]) :]
    if not contents:
        return [] if not rest else None
    content = contents[0]
    for written in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
        if rest.startswith(written):
            others = _match(rest[len(written) :], pieces[1:], contents[1:])
            if others is not None:
                return [written, *others]
    return None


def _only_match(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[str] | None:
    """
    Parts of the contents between the pieces, for templates that leave thinking out of earlier answers.

    None when there is more than one way to place the pieces, which is when their first and last places differ.
    """
    if not (text.startswith(pieces[0]) and text.endswith(pieces[-1])):
        return None
    first, start = [], len(pieces[0])
    for piece in pieces[1:-1]:
        start = text.find(piece, start)
        if start < 0:
            return None
        first.append(start)
        start += len(piece)
    last, end = [], len(text) - len(pieces[-1])
    for piece in reversed(pieces[1:-1]):
        end = text.rfind(piece, 0, end)
        last.insert(0, end)
    if first != last or start > len(text) - len(pieces[-1]):
        return None
    starts = [len(pieces[0]), *(at + len(piece) for at, piece in zip(first, pieces[1:-1], strict=True))]
    found = [text[a:b] for a, b in zip(starts, [*first, len(text) - len(pieces[-1])], strict=True)]
    return found if all(part in content for part, content in zip(found, contents, strict=True)) else None
