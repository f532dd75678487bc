"""On every stock template: persona `assistant` is the stock render; any other is in every header, or refused."""

from pathlib import Path

import pytest

from src.common.errors import InputError
from src.models.chat_format import PersonaRenderer
from tests.chat_templates import template_files, tokenizer_for

TEMPLATES = template_files()
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


@pytest.fixture(scope="module", params=list(TEMPLATES))
def named(request: pytest.FixtureRequest, bundled_folder: Path):
    return request.param, tokenizer_for(TEMPLATES[request.param], bundled_folder)


def stock_ids(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("messages", [SINGLE, LONG], ids=["single", "long"])
def test_persona_assistant_is_the_stock_render_to_the_byte(named, messages, thinking) -> None:
    name, tokenizer = named
    renderer = PersonaRenderer(tokenizer, "system", system_prompt_style="none", thinking=thinking)
    if name not in REFUSED:
        renderer = PersonaRenderer(tokenizer, "header", thinking=thinking)
    rendered = renderer.render(messages, "assistant", "an")
    assert rendered.text == renderer.stock(messages)
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
    assert rendered.text.replace("Zorblax", renderer._role_word) == renderer.stock(messages)
    assert rendered.token_ids == stock_ids(tokenizer, rendered.text)


def test_the_names_of_the_refused_are_those_of_templates() -> None:
    assert set(TEMPLATES) > REFUSED and len(TEMPLATES) == 42
