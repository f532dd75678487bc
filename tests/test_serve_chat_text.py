"""The text of an answer as its tokens come: nothing lost, nothing after a text that ends it, thinking apart."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from src.models.thinking import ThinkingReader
from src.serving.chat_text import AnswerText


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def thinker(tiny_folder: Path) -> PreTrainedTokenizerBase:
    """One that knows marks of thinking."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def decode_with(tokenizer: PreTrainedTokenizerBase):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def said(text: AnswerText, tokens: Sequence[int]) -> tuple[str, str]:
    """(answer, thinking) of all tokens, up to where it is stopped."""
    parts = [text.add(token) for token in tokens] + [text.rest()]
    return "".join(part.content for part in parts), "".join(part.thinking for part in parts)


@settings(max_examples=80, deadline=None)
@given(
    st.text(alphabet="ab cé\n🌊", max_size=30), st.lists(st.text(alphabet="ab c🌊", min_size=1, max_size=4), max_size=3)
)
def test_an_answer_is_its_text_up_to_the_first_end(tokenizer, text: str, stops: list[str]) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    decode = decode_with(tokenizer)
    answer = AnswerText(decode, ThinkingReader(tokenizer), "", stops)
    shown, thinking = said(answer, tokens)
    whole = decode(tokens)
    found = [whole.find(stop) for stop in stops if stop in whole]
    assert thinking == "" and answer.is_stopped == bool(found)
    if not found:
        assert shown == whole
    elif len(tokens) <= 1 or all(len(stop) == 1 for stop in stops):
        assert shown == whole[: min(found)]
    else:
        # It ends with the first that is complete.
        assert any(shown == whole[:place] for place in found)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=20))
def test_any_tokens_are_shown_whole(tokenizer, tokens: list[int]) -> None:
    decode = decode_with(tokenizer)
    assert said(AnswerText(decode, None, "", ()), tokens)[0] == decode(tokens)


@pytest.mark.parametrize("header", ["<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"])
@pytest.mark.parametrize("answer", ["Yes. 🌊", "\n\nYes", ""])
def test_thinking_is_apart_and_ends_where_the_reader_says(thinker, header: str, answer: str) -> None:
    start = "" if "<think>" in header else "<think>"
    tokens = thinker(f"{start}Well, stop here.</think>\n\n{answer}", add_special_tokens=False)["input_ids"]
    reader, decode = ThinkingReader(thinker), decode_with(thinker)
    shown, thinking = said(AnswerText(decode, reader, header, ["stop"]), tokens)
    span = reader.read(tokens, header)
    assert shown == span.response == answer.lstrip("\n") and thinking.strip() == span.thinking == "Well, stop here."


def test_thinking_that_is_cut_leaves_no_answer(thinker) -> None:
    tokens = thinker("<think>Well", add_special_tokens=False)["input_ids"]
    assert said(AnswerText(decode_with(thinker), ThinkingReader(thinker), "", ()), tokens) == ("", "Well")
