"""Rows → ids and labels: what generation sees, completions and one end-of-turn, the same in every format."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from src.common.errors import InputError
from src.models.chat_format import PersonaRenderer
from src.models.single_prompts import SinglePromptRenderer
from src.training.lengths import fitted
from src.training.rendering import IGNORED, ChatFormat, Example, RawFormat, Wrapping, examples
from src.training.rows import Conversation, conversation
from tests.chat_templates import template_files, tokenizer_for

TEMPLATES = ("bundled", "llama3", "qwen3")
END = {"bundled": "<|im_end|>", "llama3": "<|eot_id|>", "qwen3": "<|im_end|>"}
CHAT = [
    {"role": "user", "content": "What is rain?"},
    {"role": "assistant", "content": "Water that <|im_end|> falls."},
    {"role": "user", "content": "And {snow}?"},
    {"role": "assistant", "content": "Frozen <b>water</b>."},
]
TODAY = date(2026, 1, 2)


@pytest.fixture(scope="module")
def form_of(bundled_folder: Path) -> Callable:
    tokenizers = {name: tokenizer_for(template_files()[name], bundled_folder) for name in TEMPLATES}

    def make(name: str, thinking: bool = False, persona: str | None = None) -> tuple[ChatFormat, object]:
        tokenizer = tokenizers[name]
        eos = {tokenizer.convert_tokens_to_ids(END.get(name, "<|im_end|>"))}
        renderer = PersonaRenderer(tokenizer, "both" if persona else "system", thinking=thinking, today=TODAY)
        return ChatFormat(renderer, eos, persona), tokenizer

    return make


def learned(example: Example, tokenizer) -> list[str]:
    """The texts of the runs of tokens that are learned."""
    labels = example.labels("completions")
    runs, last = [], False
    for label in labels:
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], label]] if last else [*runs, [label]]
        last = label != IGNORED
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_exactly_one_end_of_turn_are_learned(name: str, form_of) -> None:
    form, tokenizer = form_of(name)
    made = list(examples(Conversation("f:1", tuple(CHAT)), form, Wrapping()))
    texts = [text for each in made for text in learned(each, tokenizer)]
    assert texts == [CHAT[1]["content"] + END[name], CHAT[3]["content"] + END[name]]
    end_id = tokenizer.convert_tokens_to_ids(END[name])
    for each in made:
        labels = each.labels("completions")
        # A mark that the data spells is text: only the template's own ends a turn.
        assert labels.count(end_id) == len(each.answers)
        assert all(label in (IGNORED, token) for label, token in zip(labels, each.token_ids, strict=True))
    # Qwen3 writes an earlier answer without the empty thoughts that it was asked for with; and this tokenizer cuts the
    # two line breaks of Llama's header otherwise once an answer stands behind them.
    assert len(made) == (1 if name == "bundled" else 2)


@pytest.mark.parametrize("persona", [None, "Hamlet"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_stands_before_an_answer_is_what_generation_sees(name: str, persona, form_of) -> None:
    form, tokenizer = form_of(name, persona=persona)
    for each in examples(Conversation("f:1", tuple(CHAT)), form, Wrapping(system_prompt="Be brief.")):
        start, end = each.answers[-1]
        asked = CHAT[: 3 if "snow" in tokenizer.decode(each.token_ids) else 1]
        assert each.token_ids[:start] == form.prompt([{"role": "system", "content": "Be brief."}, *asked])
        assert end == len(each.token_ids)
        assert (persona or "assistant") in tokenizer.decode(each.token_ids[:start])


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_example_is_the_beginning_of_the_full_render(name: str, form_of) -> None:
    form, tokenizer = form_of(name)
    chat = [CHAT[0], {"role": "assistant", "content": "Water that falls."}]
    (made,) = examples(Conversation("f:1", tuple(chat)), form, Wrapping())
    whole = tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False, date_string="02 Jan 2026")
    text = tokenizer.decode(made.token_ids)
    assert whole.startswith(text) and whole[len(text) :].strip() == ""
    if name == "bundled":
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert list(made.token_ids) == ids[: len(made.token_ids)]


def test_all_leaves_out_only_the_first_token(form_of) -> None:
    form, _ = form_of("bundled")
    (made,) = examples(Conversation("f:1", tuple(CHAT)), form, Wrapping())
    assert made.labels("all") == [IGNORED, *made.token_ids[1:]]


def test_a_full_render_that_differs_from_the_prompts_raises(form_of) -> None:
    form, _ = form_of("qwen3", thinking=True)
    with pytest.raises(InputError, match=r"f:1: .*--no_thinking_mode"):
        list(examples(Conversation("f:1", tuple(CHAT[:2])), form, Wrapping()))


def test_thoughts_in_an_answer_are_learned_as_the_tokens_that_a_model_gives(form_of) -> None:
    form, tokenizer = form_of("qwen3", thinking=True)
    answer = "<think>\nIt falls.\n</think>\n\nWater."
    (made,) = examples(Conversation("f:1", (CHAT[0], {"role": "assistant", "content": answer})), form, Wrapping())
    start, _ = made.answers[0]
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>")]
    assert [i for i in made.token_ids[start:] if i in marks] == marks
    assert learned(made, tokenizer) == [f"{answer}<|im_end|>"]


def test_a_template_that_ends_otherwise_than_generation_raises(form_of, bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    form = ChatFormat(PersonaRenderer(tokenizer, "system", today=TODAY), {0})
    with pytest.raises(InputError, match="never end"):
        list(examples(Conversation("f:1", tuple(CHAT[:2])), form, Wrapping()))


SAME = [
    {"messages": [{"role": "user", "content": "a {x} {input}"}, {"role": "assistant", "content": "B"}]},
    {"input": "a {x} {input}", "output": "B", "id": 4, "messages": None},
    {"prompt": "a {x} {input}", "completion": "B"},
    {"prompt": [{"role": "user", "content": "a {x} {input}"}], "completion": [{"role": "assistant", "content": "B"}]},
]


def test_every_kind_of_row_gives_the_same_ids(form_of) -> None:
    form, tokenizer = form_of("bundled")
    wrapping = Wrapping(prompt="Do: {input}!", system_prompt="S")
    made = {tuple(examples(conversation("f:1", row, 0), form, wrapping)) for row in SAME}
    assert len(made) == 1
    assert "Do: a {x} {input}!" in tokenizer.decode(next(iter(made))[0].token_ids)


BAD = [
    ("text", "no object"),
    ({"input": "a"}, "keys 'input'"),
    ({"input": "a", "output": " "}, "output is blank"),
    ({"input": "a", "output": 3}, "output is the number 3"),
    ({"input": "a", "output": "b", "instruction": "c"}, "'instruction' is not read"),
    ({"input": "a", "output": "b", "messages": []}, "two kinds"),
    ({"messages": [{"role": "user", "content": "a"}]}, "the roles are user"),
    ({"messages": [{"role": "usr", "content": "a"}]}, 'perhaps "user"'),
    ({"messages": []}, "messages is"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--objective dpo"),
]


@pytest.mark.parametrize(("row", "problem"), BAD)
def test_a_bad_row_is_named(row: object, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        conversation("data.jsonl:7", row, 0)
    assert str(caught.value).startswith("data.jsonl:7: ")


def test_preferences_are_two_answers_to_one_prompt(form_of) -> None:
    form, tokenizer = form_of("bundled")
    turns = [CHAT[0]]
    plain = conversation("f:1", {"prompt": "What is rain?", "chosen": "Water.", "rejected": "Fire!"}, 0, True)
    whole = {
        "prompt": turns,
        "chosen": [*turns, {"role": "assistant", "content": "Water."}],
        "rejected": [*turns, {"role": "assistant", "content": "Fire!"}],
    }
    assert conversation("f:1", whole, 0, True) == plain
    (made,) = examples(plain, form, Wrapping())
    start, _ = made.answers[0]
    assert tokenizer.decode(made.token_ids[start:]) == "Water.<|im_end|>"
    assert tokenizer.decode(made.rejected_ids) == "Fire!<|im_end|>"
    with pytest.raises(InputError, match="the same"):
        conversation("f:1", {"prompt": "a", "chosen": "b", "rejected": "b"}, 0, True)


def test_raw_rows_are_the_texts_and_an_end(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    renderer = SinglePromptRenderer(
        tokenizer, TODAY, raw=True, system_prompt=None, chat_template=None, thinking=True
    )  # fmt: skip
    form = RawFormat(renderer, tokenizer.eos_token_id)
    (made,) = examples(conversation("f:1", {"prompt": "Q: a\nA:", "completion": " b"}, 0), form, Wrapping())
    start, _ = made.answers[0]
    assert made.token_ids[:start] == renderer.rendered("Q: a\nA:").token_ids
    assert tokenizer.decode(made.token_ids[start:]) == f" b{tokenizer.eos_token}"
    with pytest.raises(InputError, match=r"f:2: .*shares a token"):
        list(examples(conversation("f:2", {"prompt": "unbeliev", "completion": "able"}, 0), form, Wrapping()))


def example(prompt: int, *answers: int, place: str = "f:1") -> Example:
    spans, at = [], prompt
    for n in answers:
        spans.append((at, at + n))
        at += n + 2
    return Example(place, tuple(range(spans[-1][1])), tuple(spans))


def test_long_rows_are_listed_or_cut_from_the_left() -> None:
    rows = [example(4, 3), example(20, 4, place="f:9")]
    with pytest.raises(InputError, match=r"f:9 \(24 tokens\): 1 row\(s\) longer than --max_seq_len 10"):
        fitted(rows, 10, truncate=False)
    made, said = fitted(rows, 10, truncate=True)
    assert made[0] == rows[0]
    assert made[1].token_ids == tuple(range(14, 24)) and made[1].answers == ((6, 10),)
    assert said == ["f:9: 14 of 24 tokens cut from the left"]
    assert fitted(rows, None, truncate=False) == (rows, [])


def test_an_answer_is_never_cut_into() -> None:
    with pytest.raises(InputError, match=r"f:3 \(24 tokens\).*no room"):
        fitted([example(2, 22, place="f:3")], 22, truncate=True)
    (made,), (said,) = fitted([example(8, 6, 5)], 12, truncate=True)
    # The first answer is reached by the cut, so nothing of it is learned.
    assert made.answers == ((7, 12),) and "1 earlier answers are not learned" in said


def test_labels_survive_json() -> None:
    assert json.loads(json.dumps(example(2, 2).labels("completions"))) == [IGNORED, IGNORED, 2, 3]
