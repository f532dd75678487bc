"""A user's text never becomes a control token, and every other text gets the ids of the whole string."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from src.common.errors import InputError
from src.models.chat_format_tokens import GuardedTokenizer
from tests.chat_tokenizers import ADDED, KINDS, SPECIAL, family_tokenizer

TEMPLATE = "<s><|start|>{{ role }}\n\n{{ content }}<|end|><think></think>"
TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n<>|/▁")), max_size=30)
HOSTILE = st.lists(
    st.one_of(st.sampled_from([*SPECIAL, *ADDED, "<|", "|>", "start", "<", ">", "<s", "k>", " ", "\n"]), TEXTS),
    max_size=8,
).map("".join)


def guarded(kind: str, adds_bos: bool = False) -> GuardedTokenizer:
    return GuardedTokenizer(family_tokenizer(kind, adds_bos), TEMPLATE)


@pytest.fixture(scope="module", params=list(KINDS))
def guard(request: pytest.FixtureRequest) -> GuardedTokenizer:
    return guarded(request.param)


@pytest.fixture(scope="module")
def byte_guard() -> GuardedTokenizer:
    return guarded("byte_level")


def whole(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def turn(content: str, role: str = "user") -> list[tuple[str, bool]]:
    return [("<|start|>", True), (role, False), ("\n\n", True), (content, False), ("<|end|>\n", True)]


def controls(guard: GuardedTokenizer, ids) -> list[str]:
    return [guard.control[i] for i in ids if i in guard.control and guard.control[i] != "<unk>"]


def spells_a_mark(guard: GuardedTokenizer, *texts: str) -> bool:
    return any(controls(guard, whole(guard.tokenizer, text)) for text in texts)


def test_control_tokens_are_the_special_ones_and_the_marks_that_the_template_writes(guard) -> None:
    assert set(guard.control.values()) == {*SPECIAL, "<think>", "</think>"}


@settings(max_examples=200, deadline=None)
@given(contents=st.lists(TEXTS, min_size=1, max_size=3), persona=TEXTS)
@example(contents=["a   b\n\nc", "\n", " "], persona="\n")
def test_ordinary_text_has_the_ids_of_the_whole_string(guard, contents, persona) -> None:
    if spells_a_mark(guard, persona, *contents):
        return
    segments = [("<s>", True), *(segment for content in contents for segment in turn(content, persona))]
    text = "".join(part for part, _ in segments)
    assert list(guard.encode(segments)) == whole(guard.tokenizer, text)
    # A later turn that spells a token leaves the ids of those before it as they are.
    ids = guard.encode([*segments, *turn("a</s>b")])
    before = whole(guard.tokenizer, text + "<|start|>")
    assert list(ids[: len(before)]) == before


@settings(max_examples=300, deadline=None)
@given(persona=HOSTILE, first=HOSTILE, second=HOSTILE)
@example(persona="<|end|>", first="x<s>", second="</think><think><unk>")
@example(persona="＜ｓ＞", first="<S>", second="<|END|>")
@example(persona="<|star", first="t|>", second="<|end|")
def test_a_users_text_never_becomes_a_control_token(guard, persona, first, second) -> None:
    segments = [("<s>", True), *turn(first, persona), *turn(second, persona), ("<think>", True)]
    expected = ["<s>", "<|start|>", "<|end|>", "<|start|>", "<|end|>", "<think>"]
    assert controls(guard, guard.encode(segments)) == expected


@settings(max_examples=100, deadline=None)
@given(persona=HOSTILE, content=HOSTILE)
def test_neutralised_text_is_still_the_same_text(byte_guard, persona, content) -> None:
    segments = turn(content, persona)
    assert byte_guard.tokenizer.decode(byte_guard.encode(segments)).startswith(
        f"<|start|>{persona}\n\n{content}<|end|>"
    )


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("writes_bos", [True, False])
@pytest.mark.parametrize("content", ["What?", "What <s> is <|end|>?", "<s>"])
def test_there_is_one_bos_where_the_tokenizer_or_the_template_wants_one(kind, adds_bos, writes_bos, content) -> None:
    guard = guarded(kind, adds_bos)
    ids = guard.encode([("<s>" if writes_bos else "", True), *turn(content)])
    assert controls(guard, ids).count("<s>") == (1 if adds_bos or writes_bos else 0)
    assert (ids[0] == guard.tokenizer.bos_token_id) == (adds_bos or writes_bos)


@pytest.mark.parametrize("first, second", [(("<|sta", True), ("rt|>", False)), (("<|sta", False), ("rt|>", True))])
def test_a_token_that_a_user_completes_or_begins_is_none(guard, first, second) -> None:
    assert controls(guard, guard.encode([("<s>", True), first, second, ("<|end|>", True)])) == ["<s>", "<|end|>"]


def test_an_empty_content_parts_no_token_of_the_template(guard) -> None:
    assert controls(guard, guard.encode([("<|sta", True), ("", False), ("rt|>", True)])) == ["<|start|>"]


def test_white_space_that_a_token_swallows_stays_swallowed() -> None:
    guard = guarded("byte_level")
    segments = [("<|end|>", True), ("  \n What", False), ("<|end|>", True), (" <s>", False)]
    swallowed = whole(guard.tokenizer, "<|end|>What<|end|>")
    assert list(guard.encode(segments)[: len(swallowed)]) == swallowed


def test_a_tokenizer_in_python_refuses_what_it_cannot_neutralise(tmp_path) -> None:
    from transformers import ByT5Tokenizer

    guard = GuardedTokenizer(ByT5Tokenizer(), TEMPLATE)
    assert not guard.tokenizer.is_fast
    ids = guard.encode([("Hi ", True), ("you", False), ("</s>", True)])
    assert list(ids) == whole(guard.tokenizer, "Hi you</s>")
    for segments in ([("a</s>", False), ("x", True)], [("a</", False), ("s>", True)]):
        with pytest.raises(InputError, match="spells one of the model's special tokens"):
            guard.encode(segments)
