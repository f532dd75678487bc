"""
Text to token ids where some of the text is a user's: that part never becomes a token that steers the model, and
everything else gets exactly the ids that the tokenizer gives the whole text.
"""

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from src.common.errors import InputError
from src.models.thinking import MARKS

# Added tokens in brackets are marks; others, such as Gemma's and GPT-NeoX's runs of blanks, are text like any other.
BRACKETED = re.compile(r"[<\[◁].*[>\]▷]", re.DOTALL)
BARRED = re.compile(r"<[|｜].*>|<.*[|｜]>", re.DOTALL)
Segment = tuple[str, bool]
"""Text, and whether it is the template's own."""


class Mark(NamedTuple):
    """A control token where a text was found to hold it; [start, end) in characters, white space around it left out."""

    token_id: int
    start: int
    end: int


class GuardedTokenizer:
    """
    Tokenizes segments of which the template owns some and a user the others.

    Control tokens are the tokenizer's special tokens, the marks of thinking, other added tokens in brackets that the
    chat template writes, and those written `<|…|>`. Only the template's segments can give one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        self.control: dict[int, str] = {
            token_id: token.content
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.content.strip() and (token.special or token_id in special or _is_mark(token.content, template))
        }

    def encode(self, segments: Sequence[Segment]) -> tuple[int, ...]:
        """
        Ids of the joined text, with one leading BOS where the template writes one or the tokenizer adds one.

        Raises InputError when a user's text spells a control token and this tokenizer cannot be kept from making it.
        """
        segments = _joined(segments)
        text = "".join(part for part, _ in segments)
        if self.tokenizer.is_fast:
            ids, marks = self._marked(text)
            if self._of_user(segments, marks):
                ids = self._encode_inert(segments)
        else:
            self._refuse_literals(segments)
            ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return tuple(ids if not self.prefix or ids[:1] == self.prefix[:1] else [*self.prefix, *ids])

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer itself puts before a text: a BOS, or nothing."""
        bare = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(self.tokenizer("a")["input_ids"])
        starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        return whole[: starts[0]] if starts else []

    def _marked(self, text: str) -> tuple[list[int], list[Mark]]:
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoding["input_ids"])
        return ids, list(self._marks(text, zip(ids, encoding["offset_mapping"], strict=True)))

    def _marks(self, text: str, tokens: Iterator[tuple[int, tuple[int, int]]]) -> Iterator[Mark]:
        for token_id, (start, end) in tokens:
            if token_id not in self.control:
                continue
            core = text[start:end].strip()
            # The token for unknown characters is control when it was spelled, and an ordinary outcome otherwise.
            if token_id == self.tokenizer.unk_token_id and core != self.control[token_id]:
                continue
            start += len(text[start:end]) - len(text[start:end].lstrip())
            yield Mark(token_id, start, start + len(core))

    def _of_user(self, segments: list[Segment], marks: Sequence[Mark]) -> list[Mark]:
        """Those marks that are not wholly inside one of the template's segments."""
        ends = list(accumulate(len(part) for part, _ in segments))
        found = []
        for mark in marks:
            index = bisect_right(ends, mark.start)
            if not segments[index][1] or mark.end > ends[index]:
                found.append(mark)
        return found

    def _encode_inert(self, segments: list[Segment]) -> list[int]:
        text = "".join(part for part, _ in segments)
        masked = "".join(part if owned else _masked(part) for part, owned in segments)
        marks = self._marked(masked)[1]
        foreign = set(self._of_user(segments, marks))
        marks = [mark for mark in marks if mark not in foreign]
        pieces, position = [], 0
        for mark in marks:
            pieces += [text[position : mark.start], self._aliases[mark.token_id]]
            position = mark.end
        encoding = self._inert.encode("".join([*pieces, text[position:]]), add_special_tokens=False)
        unknown = self.tokenizer.unk_token_id
        made = [i for i in encoding.ids if i in self.control and i != unknown]
        if made != [mark.token_id for mark in marks if mark.token_id != unknown]:
            self._refuse(segments)
        return list(encoding.ids)

    @cached_property
    def _aliases(self) -> dict[int, str]:
        nonce = secrets.token_hex(16)
        return {token_id: f"zq{nonce}x{token_id}qz" for token_id in self.control}

    @cached_property
    def _inert(self) -> Tokenizer:
        """The same tokenizer with its control tokens spelled as aliases that no text holds."""
        names = {literal: self._aliases[token_id] for token_id, literal in self.control.items()}
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        spec |= {"post_processor": None, "truncation": None, "padding": None}
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [[a, b] for a, b in model["merges"] if not {a, b, a + b} & names.keys()]
        if model.get("unk_token"):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        return Tokenizer.from_str(json.dumps(spec))

    def _refuse_literals(self, segments: list[Segment]) -> None:
        text = "".join(part for part, _ in segments)
        for token_id, literal in self.control.items():
            # A look-ahead, so that overlapping places are found too.
            places = re.finditer(f"(?={re.escape(literal)})", text) if literal in text else ()
            if self._of_user(segments, [Mark(token_id, m.start(), m.start() + len(literal)) for m in places]):
                self._refuse(segments)

    def _refuse(self, segments: list[Segment]) -> None:
        users = " … ".join(part for part, owned in segments if not owned)
        raise InputError(
            f"{self.tokenizer.name_or_path}: a persona, prompt or answer spells one of the model's special tokens, and "
            f"its tokenizer cannot be kept from reading it as one; take it out of {users[:200]!r}"
        )


def _is_mark(literal: str, template: str) -> bool:
    if BARRED.fullmatch(literal) or any(literal in marks for marks in MARKS):
        return True
    return bool(BRACKETED.fullmatch(literal)) and literal in template


def _masked(text: str) -> str:
    # Of the same length, so that places agree, and with the same word boundaries, which some tokens depend on.
    return re.sub(r"[^\w\s]", ".", re.sub(r"\w", "x", text))


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one owner as one segment, empty ones left out."""
    joined: list[Segment] = []
    for part, owned in segments:
        if joined and joined[-1][1] == owned:
            joined[-1] = (joined[-1][0] + part, owned)
        elif part:
            joined.append((part, owned))
    return joined
