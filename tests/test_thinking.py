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


CLOSED = HEADER + "<think>\n\n</think>\n\n"


def test_a_lone_end_mark_ends_thinking_unless_the_prompt_has_closed_it(tokenizer) -> None:
    _, span = read(tokenizer, "Let me see.</think>It is rain.")
    assert (span.thinking, span.response) == ("Let me see.", "It is rain.")
    _, span = read(tokenizer, "The tag </think> ends it.", CLOSED)
    assert (span.num_tokens, span.thinking, span.truncated) == (0, None, False)


def test_thinking_that_the_prompt_closed_may_be_opened_by_the_response(tokenizer) -> None:
    _, span = read(tokenizer, "<think>Hm.</think>It is rain.", CLOSED)
    assert (span.thinking, span.response) == ("Hm.", "It is rain.")
    _, span = read(tokenizer, "<think>Hm.", CLOSED)
    assert (span.truncated, span.response) == (True, "")


def test_thinking_that_begins_again_and_is_cut_off_is_no_answer(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    _, span = read(tokenizer, "<think>A</think>B<think>C</think>D")
    assert (span.response, span.truncated) == ("D", False)
    ids, span = read(tokenizer, "<think>A</think>B<think>C")
    assert (span.num_tokens, span.truncated, span.response) == (len(ids), True, "")


def test_a_mark_spelled_in_letters_is_none_where_it_is_a_token(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    spelled = [i for part in ("Write </th", "ink> then.") for i in tokenizer(part)["input_ids"]]
    tokenizer.add_tokens(["<think>", "</think>"])
    span = ThinkingReader(tokenizer).read(spelled, HEADER)
    assert (span.num_tokens, span.response) == (0, "Write </think> then.")


def test_a_mark_named_late_in_an_answer_opens_nothing_where_it_is_text(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = TEMPLATE
    _, span = read(tokenizer, "Models write <think> first.")
    assert (span.num_tokens, span.response) == (0, "Models write <think> first.")


def test_channels(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.add_tokens(["<|start|>", "<|channel|>", "<|message|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = {"default": "<|channel|>analysis<|message|> <|channel|>final<|message|>"}
    thought = "<|channel|>analysis<|message|>Let me see.<|end|>"
    ids, span = read(tokenizer, f"{thought}<|start|>Prince Hamlet<|channel|>final<|message|>It is rain.", "<|start|>x")
    assert (span.thinking, span.response, span.truncated) == ("Let me see.", "It is rain.", False)
    assert tokenizer.decode(ids[: span.num_tokens]).endswith("<|channel|>final<|message|>")
    _, span = read(tokenizer, thought, "<|start|>x")
    assert (span.thinking, span.response, span.truncated) == ("Let me see.", "", True)
