"""On every stock template: persona `assistant` is the stock render; any other is in every header, or refused."""

from pathlib import Path

import pytest

from src.common.errors import InputError
from src.models.chat_format import PersonaRenderer
from tests.chat_templates import template_files, tokenizer_for

TEMPLATES = template_files()
QUICK = ("bundled", "gemma", "glm4moe", "gptoss", "llama3", "qwen3", "qwen3_5_think")
"""One of each kind for the fast part of the suite; the slow part has them all."""
# The assistant's role word is part of a special token, or there is no assistant header at all.
REFUSED = {
    *("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "glm4moe", "llava_next", "phi3", "phi3_5"),
}
SINGLE = [{"role": "user", "content": "What is rain?"}]
LONG = [
    {"role": "user", "content": "  Hello there,\nfriend.  "},
    {"role": "assistant", "content": "An assistant model says: hi.\n"},
    {"role": "user", "content": "assistant\nWhy?"},
    {"role": "assistant", "content": "Because {it} is `so`."},
    {"role": "user", "content": "assistant"},
]


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TEMPLATES],
)
def named(request: pytest.FixtureRequest, bundled_folder: Path):
    return request.param, tokenizer_for(TEMPLATES[request.param], bundled_folder)


@pytest.fixture(scope="module")
def renderer(named) -> PersonaRenderer:
    """The most that the template allows."""
    name, tokenizer = named
    return PersonaRenderer(tokenizer, "system" if name in REFUSED else "both")


def stock_ids(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def stock(tokenizer, messages, thinking: bool) -> str:
    """What a user of the tokenizer alone would render, with contents as a list where strings are dropped."""
    if "line['type']" in tokenizer.chat_template or "['content'][0]['text']" in tokenizer.chat_template:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking, thinking=thinking
    )


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("messages", [SINGLE, LONG], ids=["single", "long"])
def test_persona_assistant_is_the_stock_render_to_the_byte(named, messages, thinking) -> None:
    name, tokenizer = named
    renderer = PersonaRenderer(tokenizer, "system", system_prompt_style="none", thinking=thinking)
    if name not in REFUSED:
        renderer = PersonaRenderer(tokenizer, "header", thinking=thinking)
    rendered = renderer.render(messages, "assistant", "an")
    assert rendered.text == renderer.stock(messages) == stock(tokenizer, messages, thinking)
    assert rendered.token_ids == stock_ids(tokenizer, rendered.text)
    assert rendered.persona_applied == "none"


@pytest.mark.parametrize("messages", [SINGLE, LONG], ids=["single", "long"])
def test_the_system_prompt_is_in_every_template(named, messages) -> None:
    _, tokenizer = named
    rendered = PersonaRenderer(tokenizer, "system").render(messages, "Hamlet", "")
    assert rendered.text.count("You are Hamlet.") == 1
    assert rendered.persona_applied in ("system", "folded")
    if rendered.persona_applied == "folded":
        folded = [{"role": "user", "content": f"You are Hamlet.\n\n{messages[0]['content']}"}, *messages[1:]]
    else:
        folded = [{"role": "system", "content": "You are Hamlet."}, *messages]
    assert rendered.text == PersonaRenderer(tokenizer, "system").stock(folded)


@pytest.mark.parametrize("messages", [SINGLE, LONG], ids=["single", "long"])
def test_another_persona_is_in_every_header_or_refused(named, messages) -> None:
    name, tokenizer = named
    if name in REFUSED:
        with pytest.raises(InputError, match=r"--persona_mode system"):
            PersonaRenderer(tokenizer, "header")
        return
    renderer = PersonaRenderer(tokenizer, "header")
    rendered = renderer.render(messages, "Zorblax", "")
    n_answers = sum(m["role"] == "assistant" for m in messages)
    assert rendered.text.count("Zorblax") == n_answers + 1
    assert rendered.persona_applied == "header"
    # Nothing else changed: putting the role word back gives the stock render.
    assert rendered.text.replace("Zorblax", renderer.role_word) == renderer.stock(messages)
    assert rendered.token_ids == stock_ids(tokenizer, rendered.text)


def control_ids(tokenizer, ids: tuple[int, ...]) -> list[int]:
    added = set(tokenizer.get_added_vocab().values())
    return [i for i in ids if i in added]


@pytest.mark.parametrize("blank", ["", " \n"])
def test_blank_answers_carry_the_persona_too(named, renderer, blank: str) -> None:
    name, tokenizer = named
    messages = [{**m, "content": blank} if m["role"] == "assistant" else m for m in LONG]
    rendered = renderer.render(messages, "Zorblax")
    assert rendered.text.count("Zorblax") == (1 if name in REFUSED else 4)
    assert rendered.token_ids == stock_ids(tokenizer, rendered.text)


def test_no_text_becomes_a_token_of_the_template(named, renderer) -> None:
    _, tokenizer = named
    # Marks of thinking have a test of their own: some templates take them out of earlier answers.
    literals = [t for t in tokenizer.get_added_vocab() if not any(mark in t for mark in ("think", "hannel", "THINK"))]
    hostile = " ".join(["zqx1marker1xqz", *literals])
    benign = renderer.render(LONG, "Zorblax")
    messages = [{**m, "content": f"x {hostile} y"} for m in LONG]
    for persona, chat in ((hostile, messages), (hostile, LONG), ("Zorblax", messages)):
        rendered = renderer.render(chat, persona)
        assert control_ids(tokenizer, rendered.token_ids) == control_ids(tokenizer, benign.token_ids)
        assert tokenizer.decode(list(rendered.token_ids)) == rendered.text


THINKING_LOST = [f"nemotron_3_{size}" for size in ("5_lightning", "nano", "super", "ultra")]


def test_marks_of_thinking_in_a_text_are_text(named, renderer) -> None:
    name, tokenizer = named
    benign = renderer.render(LONG, "Zorblax")
    marked = [{**m, "content": "is </think> a <think> or [THINK]?"} if m["role"] == "user" else m for m in LONG]
    rendered = renderer.render(marked, "<think>Zorblax</think>")
    assert control_ids(tokenizer, rendered.token_ids) == control_ids(tokenizer, benign.token_ids)
    earlier = [{**m, "content": "Hm.</think>So."} if m["role"] == "assistant" else m for m in LONG]
    if name in THINKING_LOST:
        # They write marks of their own only before answers that hold none.
        with pytest.raises(InputError, match="cannot be followed"):
            renderer.render(earlier, "Zorblax")
    else:
        rendered = renderer.render(earlier, "Zorblax")
        assert control_ids(tokenizer, rendered.token_ids) == control_ids(tokenizer, benign.token_ids)


def test_the_names_of_the_refused_are_those_of_templates() -> None:
    assert set(TEMPLATES) > REFUSED and len(TEMPLATES) == 42
