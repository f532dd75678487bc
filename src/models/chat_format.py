"""
Conversations as token ids, with a persona's name in every assistant header.

Everything is read off what the model's own chat template writes, never off the template's source: contents are first
replaced by markers, so that what stands between them is known to be the template's; then the real render must consist
of exactly those pieces and the contents, or it is refused.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from src.common.errors import InputError
from src.common.system_prompts import PLAIN, read_chat_template, system_prompt
from src.models.thinking import MARKS

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MODES = ("header", "system", "both")
# The words of no template, and of nothing that a template tests for.
MARKER = "zqx{}marker{}xqz"
REMEDY = "use --persona_mode system, which names the persona in the system prompt only"
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class RenderedPrompt:
    """A conversation up to where the assistant's next answer begins."""

    token_ids: tuple[int, ...]
    text: str
    persona_applied: str
    """What was done, read off the render: `header` and / or `system` (or `folded` into the first user turn) joined by
    `+`; `none` when the text is what the stock template writes of the same messages."""
    system_prompt: str | None
    header: str
    """What the template writes after the last message: the last assistant header."""


def with_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    """
    `tokenizer` with the template in a Jinja file, or with `plain`: "User: …", "Assistant: …".

    Raises InputError when the file cannot be read, and when there is no template at all (a base model).
    """
    if chat_template is not None:
        tokenizer.chat_template = PLAIN_TEMPLATE if chat_template == PLAIN else read_chat_template(chat_template)
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template (a base model?); "
            f"pass --chat_template FILE, or --chat_template plain"
        )
    return tokenizer


class PersonaRenderer:
    """
    Renders conversations for one tokenizer, its template analysed once.

    mode: `header` puts the persona's name into every assistant header, `system` into the system prompt, `both` does
    both. Raises InputError when the template gives no header that can be proven to carry the name.
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
        self.tokenizer = tokenizer
        self.mode = mode
        self.style = system_prompt_style
        self.thinking = thinking
        self.today = today or date.today()
        """What templates that write the date write, so that a run that goes on tomorrow asks what it asked today."""
        self._pieces = lru_cache(maxsize=64)(self._pieces_of_shape)
        if mode != "system":
            # Refuse before anything is generated, earlier headers included.
            self._headers(("user", "assistant", "user"), "\0")

    def render(self, messages: Sequence[Message], persona: str, article: str) -> RenderedPrompt:
        """
        `messages`: {"role", "content"} of user and assistant in turn, the user first and last.

        Raises InputError for an empty persona, or when the render cannot be proven to carry it.
        """
        if not persona.strip():
            raise InputError("the persona is empty; expected a name")
        system = system_prompt(persona, article, self.style) if self.mode != "header" else None
        shaped, how = self._with_system(messages, system)
        roles = tuple(m["role"] for m in shaped)
        contents = self._written_contents(shaped, roles)
        pieces = list(self._pieces(roles))
        owned_headers = self._headers(roles, persona) if self.mode != "system" else []
        segments = list(_segments(pieces, contents, owned_headers))
        text = "".join(segment for segment, _ in segments)
        changed = [name for name in ("header" if owned_headers else None, how) if name]
        return RenderedPrompt(
            token_ids=self._token_ids(segments),
            text=text,
            persona_applied="+".join(changed) or "none",
            system_prompt=system,
            header=pieces[-1],
        )

    def stock(self, messages: Sequence[Message]) -> str:
        """What the template itself writes of `messages`, the generation prompt included."""
        return self._apply(list(messages), generation=True)

    @cached_property
    def _content_is_parts(self) -> bool:
        # Templates of multimodal models may only take a list of parts.
        marker = MARKER.format(0, 0)
        for as_parts in (False, True):
            try:
                if marker in self._apply([{"role": "user", "content": marker}], True, as_parts=as_parts):
                    return as_parts
            except (TemplateError, TypeError):
                continue
        raise InputError(f"{self._name}: its chat template does not write a user's message; pass --chat_template FILE")

    @cached_property
    def _takes_system(self) -> bool:
        markers = [MARKER.format(i, 0) for i in range(2)]
        messages = [{"role": "system", "content": markers[0]}, {"role": "user", "content": markers[1]}]
        try:
            text = self._apply(messages, generation=True)
        except (TemplateError, TypeError):
            return False
        return all(text.count(marker) == 1 for marker in markers)

    @cached_property
    def _role_word(self) -> str:
        header = self._generation_prompt
        marks = [mark for pair in MARKS for mark in pair]
        words = re.findall(r"[^\W\d_]+", re.sub("|".join(map(re.escape, marks)), " ", self._outside_tokens(header)))
        if len(words) == 1:
            return words[0]
        if words:
            reason = f"is one of several words ({', '.join(words)})"
        else:
            reason = "lies inside a special token" if re.search(r"[^\W\d_]", header) else "does not exist"
        raise InputError(
            f"{self._name}: the role word of its assistant header {header!r} {reason}, "
            f"so it cannot carry a persona; {REMEDY}"
        )

    @cached_property
    def _generation_prompt(self) -> str:
        message = [{"role": "user", "content": MARKER.format(0, 0)}]
        without, with_prompt = self._apply(message, False), self._apply(message, True)
        shared = next(
            (i for i, pair in enumerate(zip(without, with_prompt, strict=False)) if len(set(pair)) > 1), len(without)
        )
        # Two tokens that begin alike, such as an end of sequence and a header, share their first characters.
        inside = [m.start() for m in self._token_pattern.finditer(with_prompt) if m.start() < shared < m.end()]
        return with_prompt[min([shared, *inside]) :]

    @property
    def _name(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path or type(self.tokenizer).__name__}"

    def _apply(self, messages: list[Message], generation: bool, as_parts: bool | None = None) -> str:
        if self._content_is_parts if as_parts is None else as_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=generation,
            # The same wish under the names that templates know it by.
            enable_thinking=self.thinking,
            thinking=self.thinking,
            strftime_now=self.today.strftime,
        )

    def _with_system(self, messages: Sequence[Message], system: str | None) -> tuple[list[Message], str | None]:
        if system is None:
            return list(messages), None
        if self._takes_system:
            return [{"role": "system", "content": system}, *messages], "system"
        first = {"role": "user", "content": f"{system}\n\n{messages[0]['content']}"}
        return [first, *messages[1:]], "folded"

    def _pieces_of_shape(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """What the template writes before, between and after contents of these roles: len(roles) + 1 texts."""
        markers = [MARKER.format(i, i) for i in range(len(roles))]
        messages = [{"role": r, "content": m} for r, m in zip(roles, markers, strict=True)]
        text = self._apply(messages, generation=True)
        if any(text.count(marker) != 1 for marker in markers):
            raise InputError(f"{self._name} drops or doubles one of the messages {', '.join(roles)}; {REMEDY}")
        pieces = re.split("|".join(markers), text)
        if [m.group() for m in re.finditer("|".join(markers), text)] != markers:
            raise InputError(f"{self._name} does not write the messages {', '.join(roles)} in their order")
        return tuple(pieces)

    def _written_contents(self, messages: list[Message], roles: tuple[str, ...]) -> list[str]:
        """Each content as the template writes it (many strip white space): pieces and contents make the render."""
        text = self._apply(messages, generation=True)
        contents = _match(text, self._pieces(roles), [m["content"] for m in messages])
        if contents is None:
            raise InputError(
                f"{self._name} changes a message's text in a way that cannot be followed, in the conversation that "
                f"begins {messages[0]['content'][:60]!r}; {REMEDY}, or pass --chat_template FILE"
            )
        return contents

    def _headers(self, roles: tuple[str, ...], persona: str) -> list[tuple[int, int, int, str]]:
        """(piece, start, end, name) of every role word that gives way to the persona's name; none for `assistant`."""
        pieces = self._pieces(roles)
        word = self._role_word
        if persona in ("assistant", word):
            return []
        headers = []
        for i in [*(i for i, role in enumerate(roles) if role == "assistant"), len(pieces) - 1]:
            # Before a first answer the piece may hold a stock system prompt that speaks of an assistant too.
            places = list(self._word_places(pieces[i], word))
            if not places:
                raise InputError(f"{self._name} writes no {word!r} before an earlier answer ({pieces[i]!r}); {REMEDY}")
            if len(places) > 1:
                raise InputError(f"{self._name} writes {word!r} {len(places)} times in {pieces[i]!r}; {REMEDY}")
            headers.append((i, *places[0], persona))
        return headers

    def _word_places(self, text: str, word: str) -> Iterator[tuple[int, int]]:
        inside = [match.span() for match in self._token_pattern.finditer(text)]
        for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text):
            if not any(start < match.end() and match.start() < end for start, end in inside):
                yield match.span()

    def _outside_tokens(self, text: str) -> str:
        return self._token_pattern.sub(" ", text)

    @cached_property
    def _token_pattern(self) -> re.Pattern[str]:
        """Every added token's literal, the special ones and those like <think> that are not."""
        literals = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, literals)) or r"(?!)")

    def _token_ids(self, segments: list[tuple[str, bool]]) -> tuple[int, ...]:
        """
        The ids of the whole text, with at most one leading BOS: the template's own, or the one that the tokenizer adds.

        A user's text that spells a token is cut inside the literal and the parts are tokenized apart, so that it can
        never become that token; any other text is tokenized whole, as the stock render would be.
        """
        text = "".join(segment for segment, _ in segments)
        parts = _cut(text, self._cuts(text, segments))
        ids = [i for part in parts for i in self.tokenizer(part, add_special_tokens=False)["input_ids"]]
        self._refuse_stray_tokens(ids, text, segments)
        bos = self.tokenizer.bos_token_id
        return tuple([bos, *ids] if self._adds_bos and ids[0] != bos else ids)

    def _refuse_stray_tokens(self, ids: list[int], text: str, segments: list[tuple[str, bool]]) -> None:
        # A normalizer may turn look-alike characters into a token's literal after the text was searched for it.
        owned = [flag for segment, flag in segments for _ in segment]
        spelled = [m for m in self._token_pattern.finditer(text) if all(owned[m.start() : m.end()])]
        added = set(self.tokenizer.get_added_vocab().values()) - {self.tokenizer.unk_token_id}
        n_unknown = sum(m.group() == self.tokenizer.unk_token for m in spelled)
        if sum(i in added for i in ids) > len(spelled) - n_unknown:
            raise InputError(
                f"{self._name}: the tokenizer reads a special token out of a persona's, prompt's or answer's own text, "
                f"in {text[:200]!r}; write it otherwise"
            )

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("x")["input_ids"][:1] == [bos]

    def _cuts(self, text: str, segments: list[tuple[str, bool]]) -> list[int]:
        owned = [flag for segment, flag in segments for _ in segment]
        cuts = []
        # Overlapping matches too: a literal may begin inside another.
        position = 0
        while match := self._token_pattern.search(text, position):
            inside = [i for i in range(match.start(), match.end()) if not owned[i]]
            if inside:
                # One character literals cannot be cut; no tokenizer adds one that a template would give a meaning.
                cuts.append(max(inside[0], match.start() + 1))
                position = match.start() + 1
            else:
                position = match.end()
        return cuts


def _match(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[str] | None:
    """The contents as `text` holds them between `pieces`, or None when it is not made of these."""
    if not text.startswith(pieces[0]):
        return None
    rest = text[len(pieces[0]) :]
    if not contents:
        return [] if not rest else None
    for written in _ways_to_write(contents[0]):
        if rest.startswith(written):
            others = _match(rest[len(written) :], pieces[1:], contents[1:])
            if others is not None:
                return [written, *others]
    return None


def _ways_to_write(content: str) -> list[str]:
    # Templates of thinking models drop what stands before the end of the thinking in earlier answers.
    answer = re.split(r"</think>", content)[-1]
    ways = [content, content.strip(), content.lstrip(), content.rstrip(), answer.strip(), answer.lstrip("\n")]
    return list(dict.fromkeys(ways))


def _segments(
    pieces: Sequence[str], contents: Sequence[str], headers: Sequence[tuple[int, int, int, str]]
) -> Iterator[tuple[str, bool]]:
    """The text in order, each part with whether the template owns it."""
    names = {piece: (start, end, name) for piece, start, end, name in headers}
    for i, piece in enumerate(pieces):
        if i in names:
            start, end, name = names[i]
            yield piece[:start], True
            yield name, False
            yield piece[end:], True
        else:
            yield piece, True
        if i < len(contents):
            yield contents[i], False


def _cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(set(cuts)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]
