from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from src.models.thinking import ThinkingReader

HEADER = "<|im_start|>assistant\n"
TEMPLATE = "{% if enable_thinking %}<think>{% endif %}{{ messages[0].content.split('</think>') }}"


@pytest.fixture(params=["token", "several tokens"])
def tokenizer(request: pytest.FixtureRequest, bundled_folder: Path) -> PreTrainedTokenizerBase:
    made = AutoTokenizer.from_pretrained(bundled_folder)
    if request.param == "token":
        made.add_tokens(["<think>", "</think>"])
    made.chat_template = TEMPLATE
    return made


def read(tokenizer: PreTrainedTokenizerBase, response: str, header: str = HEADER):
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return ids, ThinkingReader(tokenizer).read(ids, header)


def test_thinking_ends_with_its_mark(tokenizer) -> None:
    ids, span = read(tokenizer, "<think>\nLet me see.\n</think>\n\nIt is rain.")
    assert span.thinking == "Let me see." and span.response == "It is rain."
    assert not span.truncated and span.end_position == span.num_tokens - 1
    assert "</think>" in tokenizer.decode(ids[: span.num_tokens])
    assert "</think>" not in tokenizer.decode(ids[: span.end_position])


def test_the_prompt_may_open_the_thinking(tokenizer) -> None:
    _, span = read(tokenizer, "Let me see.</think>It is rain.", HEADER + "<think>\n")
    assert (span.thinking, span.response, span.truncated) == ("Let me see.", "It is rain.", False)


@pytest.mark.parametrize("response, header", [("<think>\nLet me", HEADER), ("Let me", HEADER + "<think>\n")])
def test_thinking_that_was_cut_off_is_never_counted_as_an_answer(tokenizer, response: str, header: str) -> None:
    ids, span = read(tokenizer, response, header)
    assert span.truncated and span.num_tokens == len(ids) and span.end_position is None
    assert span.thinking == "Let me" and span.response == ""


@pytest.mark.parametrize("header", [HEADER, HEADER + "<think>\n\n</think>\n\n"])
def test_an_answer_without_marks_is_all_answer(tokenizer, header: str) -> None:
    _, span = read(tokenizer, "It is rain.", header)
    assert (span.num_tokens, span.thinking, span.response, span.truncated) == (0, None, "It is rain.", False)


def test_no_tokens_at_all(tokenizer) -> None:
    assert ThinkingReader(tokenizer).read([], HEADER).response == ""
    assert ThinkingReader(tokenizer).read([], HEADER + "<think>\n").truncated


def test_a_model_that_knows_no_marks_never_thinks(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    assert ThinkingReader(tokenizer).marks is None
    _, span = read(tokenizer, "<think>It is</think> rain.")
    assert span.num_tokens == 0 and span.response == "<think>It is</think> rain."


def test_other_marks_are_found_by_the_vocabulary(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=True)
    _, span = read(tokenizer, "[THINK]Hm.[/THINK]Rain.")
    assert (span.thinking, span.response) == ("Hm.", "Rain.")


def test_an_answer_after_a_closed_block_may_speak_of_the_marks(tokenizer) -> None:
    _, span = read(tokenizer, "The tag </think> ends it.", HEADER + "<think>\n\n</think>\n\n")
    assert span.num_tokens == 0 and span.response == "The tag </think> ends it."
