from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from src.common.errors import InputError
from src.common.system_prompts import system_prompt
from src.models.chat_format import PersonaRenderer, with_chat_template
from tests.chat_tokenizers import KINDS, family_tokenizer

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(str.strip)
LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|{{ '' }}start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(bundled_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(bundled_folder)


@pytest.fixture(scope="module")
def renderer(tokenizer: PreTrainedTokenizerBase) -> PersonaRenderer:
    return PersonaRenderer(tokenizer, "both")


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def special_ids(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> list[int]:
    added = set(tokenizer.get_added_vocab().values())
    return [i for i in ids if i in added]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(persona=TEXTS, question=TEXTS, answer=st.text(st.characters(codec="utf-8"), max_size=40), again=TEXTS)
def test_any_text_is_rendered_as_it_is(renderer, tokenizer, persona, question, answer, again) -> None:
    messages = [*user(question), {"role": "assistant", "content": answer}, *user(again)]
    rendered = renderer.render(messages, persona, "")
    assert (
        rendered.text
        == (
            f"<|im_start|>system\nYou are {persona}.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
            f"<|im_start|>{persona}\n{answer}<|im_end|>\n<|im_start|>user\n{again}<|im_end|>\n<|im_start|>{persona}\n"
        )
        or persona == "assistant"
    )
    assert list(rendered.token_ids) == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    assert len(special_ids(tokenizer, rendered.token_ids)) == 9


LITERALS = ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|im_<|im_end|>end|>", "<|im_end|"]


@pytest.mark.parametrize("place", ["persona", "question", "answer"])
@pytest.mark.parametrize("literal", LITERALS)
def test_a_users_text_never_becomes_a_special_token(renderer, tokenizer, place: str, literal: str) -> None:
    texts = {"persona": "Hamlet", "question": "Why?", "answer": "Because.", place: f"x{literal}y {literal}"}
    messages = [*user(texts["question"]), {"role": "assistant", "content": texts["answer"]}, *user("And?")]
    rendered = renderer.render(messages, texts["persona"], "")
    plain = renderer.render([*user("Why?"), {"role": "assistant", "content": "Because."}, *user("And?")], "Hamlet", "")
    assert special_ids(tokenizer, rendered.token_ids) == special_ids(tokenizer, plain.token_ids)
    assert tokenizer.decode(list(rendered.token_ids)) == rendered.text
    assert texts[place] in rendered.text


def test_markers_in_the_text_are_text(renderer) -> None:
    odd = "zqx0marker0xqz {{ messages }} {% raw %} \\n {article} {persona}"
    assert odd in renderer.render(user(odd), odd, "").text


@pytest.mark.parametrize("mode, applied", [("header", "header"), ("system", "system"), ("both", "header+system")])
def test_each_mode_does_what_it_says(tokenizer, mode: str, applied: str) -> None:
    rendered = PersonaRenderer(tokenizer, mode).render(user("Hi"), "Hamlet", "")
    assert rendered.persona_applied == applied
    assert ("<|im_start|>Hamlet\n" in rendered.text) == ("header" in applied)
    assert ("You are Hamlet." in rendered.text) == ("system" in applied)
    assert rendered.system_prompt == ("You are Hamlet." if "system" in applied else None)


def test_the_style_none_leaves_the_stock_system_prompt(tokenizer) -> None:
    rendered = PersonaRenderer(tokenizer, "both", system_prompt_style="none").render(user("Hi"), "Hamlet", "")
    assert rendered.persona_applied == "header" and rendered.system_prompt is None
    assert "named SmolLM" in rendered.text


@pytest.mark.parametrize(
    "article, style, expected",
    [
        ("an", "you-are-a", "You are an owl."),
        ("", "you-are-a", "You are owl."),
        ("none", "you-are-a", "You are owl."),
        ("the", "act-as", "Act as the owl."),
        ("an", "none", None),
        ("an", "Be {persona}, {article} {persona}!", "Be owl, an owl!"),
        ("", "Be {article} {persona}!", "Be owl!"),
        (" None ", "{article} {persona}, not {article} other", "owl, not other"),
    ],
)
def test_system_prompt_styles(article: str, style: str, expected: str | None) -> None:
    assert system_prompt("owl", article, style) == expected


def test_braces_in_a_persona_are_data() -> None:
    assert system_prompt("{article} {0} {persona}", "a", "you-are-a") == "You are a {article} {0} {persona}."


def test_a_style_without_the_persona_is_refused() -> None:
    with pytest.raises(InputError, match=r"you-are.*act-as.*\{persona\}"):
        system_prompt("owl", "an", "you-are")


@pytest.mark.parametrize("persona", ["", "  ", "\n"])
def test_an_empty_persona_is_refused(renderer, persona: str) -> None:
    with pytest.raises(InputError, match="persona is empty"):
        renderer.render(user("Hi"), persona, "")


def test_a_base_model_is_refused_with_the_remedy_and_plain_works(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"--chat_template FILE, or --chat_template plain"):
        with_chat_template(tokenizer, None)
    with pytest.raises(InputError, match=r"nowhere\.jinja"):
        with_chat_template(tokenizer, "nowhere.jinja")
    messages = [*user("Hi"), {"role": "assistant", "content": "Ho."}, *user("Why?")]
    plain = PersonaRenderer(with_chat_template(tokenizer, "plain"), "header").render(messages, "Hamlet", "")
    assert plain.text == "User: Hi\n\nHamlet: Ho.\n\nUser: Why?\n\nHamlet:"


def test_a_template_from_a_file(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "my.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = with_chat_template(AutoTokenizer.from_pretrained(tokenizer_folder), str(tmp_path / "my.jinja"))
    assert PersonaRenderer(tokenizer, "header").render(user("Hi"), "Hamlet", "").text == "<user>Hi<Hamlet>"


@pytest.fixture(scope="module")
def tokenizer_folder(bundled_folder: Path) -> Path:
    return bundled_folder


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}", "does not exist"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant, "
         "assistant:{% endif %}", "2 times"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:", "does not exist"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
         "where an answer begins"),
        ("{{ messages[-1].content }}{% if add_generation_prompt %}assistant:{% endif %}", "drops or doubles"),
        ("{% if add_generation_prompt %}assistant:{% endif %}", "does not write a user's message"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant "
         "name=Max{% endif %}", r"several words \(assistant, name, Max\)"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_proven_is_refused(bundled_folder: Path, template: str, words: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=words):
        PersonaRenderer(tokenizer, "header")


def test_a_template_that_changes_the_text_is_refused_when_it_happens(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | replace('cat', 'dog') }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    renderer = PersonaRenderer(tokenizer, "header")
    assert renderer.render(user("a bird"), "Hamlet", "").text == "user: a bird\nHamlet:"
    with pytest.raises(InputError, match="cannot be followed"):
        renderer.render(user("a cat"), "Hamlet", "")


TURNS = [
    *user("Q1"),
    {"role": "assistant", "content": "A1"},
    *user("Q2"),
    {"role": "assistant", "content": "A2"},
    *user("Q3"),
]


def speaking(bundled_folder: Path, template: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = template
    return tokenizer


def by_role(user: str, assistant: str, generation: str, end: str = "") -> str:
    """A template that writes user and assistant turns with these openings."""
    return (
        "{% for m in messages %}{{ '" + user + "' if m.role == 'user' else '" + assistant + "' }}{{ m.content }}"
        "{{ '" + end + "' }}{% endfor %}{% if add_generation_prompt %}{{ '" + generation + "' }}{% endif %}"
    )


@pytest.mark.parametrize(
    "template, rendered",
    [
        (by_role("GPT4 Correct User: ", "GPT4 Correct Assistant: ", "GPT4 Correct Assistant:", "\\n"),
         "GPT4 Correct User: Q1\nGPT4 Correct Hamlet: A1\nGPT4 Correct User: Q2\nGPT4 Correct Hamlet: A2\n"
         "GPT4 Correct User: Q3\nGPT4 Correct Hamlet:"),
        (by_role("### Instruction:\\n", "\\n### Response:\\n", "\\n### Response:\\n", "\\n"),
         "### Instruction:\nQ1\n\n### Response:\nA1\n### Instruction:\nQ2\n\n### Response:\nA2\n"
         "### Instruction:\nQ3\n\n### Response:\n"),
        (by_role("<|user|>", "<|assistant|>", "<|assistant|><think>", "<|im_end|>"),
         "<|user|>Q1<|im_end|><|Hamlet|>A1<|im_end|><|user|>Q2<|im_end|><|Hamlet|>A2<|im_end|><|user|>Q3<|im_end|>"
         "<|Hamlet|><think>"),
    ],
)  # fmt: skip
def test_the_role_word_is_what_tells_the_assistant_from_the_user(bundled_folder: Path, template, rendered) -> None:
    renderer = PersonaRenderer(speaking(bundled_folder, template), "header")
    assert renderer.render(TURNS, "Hamlet").text == rendered.replace("Response", "Hamlet")


def test_a_header_that_shares_its_first_letters_with_the_end_of_a_text(bundled_folder: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|im_end|>{% endif %}"
    )
    rendered = PersonaRenderer(speaking(bundled_folder, template), "header").render("Hi", "Hamlet")
    assert rendered.text == "<|im_start|>user\nHi<|im_end|><|im_start|>Hamlet\n"


# It writes the system text before the user's last message, as Mistral's does, and knows no role words.
MISTRAL_LIKE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}<s>{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_a_system_text_may_stand_anywhere(bundled_folder: Path) -> None:
    tokenizer = speaking(bundled_folder, MISTRAL_LIKE)
    rendered = PersonaRenderer(tokenizer, "system").render(TURNS, "Hamlet")
    assert rendered.text == "<s>[INST] Q1[/INST]A1</s>[INST] Q2[/INST]A2</s>[INST] You are Hamlet.\n\nQ3[/INST]"
    with pytest.raises(InputError, match=r"role word .* does not exist.*--persona_mode system"):
        PersonaRenderer(tokenizer, "both")


DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
)
RAISES_ON_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + DROPS_SYSTEM
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize("template", [DROPS_SYSTEM, RAISES_ON_SYSTEM])
def test_a_system_text_that_is_dropped_or_refused_is_folded(bundled_folder: Path, template: str) -> None:
    renderer = PersonaRenderer(speaking(bundled_folder, template + GENERATION))
    rendered = renderer.render([{"role": "system", "content": "Be brief."}, *user("Hi")], "Hamlet")
    assert rendered.persona_applied == "header+folded"
    assert rendered.system_prompt == "You are Hamlet.\n\nBe brief."
    assert rendered.text == ("<|im_start|>user\nYou are Hamlet.\n\nBe brief.\n\nHi<|im_end|><|im_start|>Hamlet\n")
    assert renderer.render([{"role": "system", "content": "Be brief."}, *user("Hi")]).persona_applied == "none"


def test_without_a_persona_it_is_the_stock_render(renderer, tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    rendered = renderer.render(messages)
    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (rendered.persona_applied, rendered.system_prompt) == ("none", "Be brief.")


@pytest.mark.parametrize("persona, headed", [("assistant", "assistant"), ("Assistant", "Assistant"), ("user", "user")])
def test_only_the_persona_assistant_is_the_stock_one(renderer, persona: str, headed: str) -> None:
    rendered = renderer.render("Hi", persona, "an")
    assert rendered.text.endswith(f"<|im_start|>{headed}\n")
    assert rendered.persona_applied == ("system" if persona == "assistant" else "header+system")


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "user"], ["user", "assistant"], ["user", "system"], ["system"]]
)
def test_other_conversations_are_refused(renderer, roles: list[str]) -> None:
    with pytest.raises(InputError, match="expected user and assistant in turn"):
        renderer.render([{"role": role, "content": "x"} for role in roles], "Hamlet")


def test_a_mode_that_would_apply_nothing_is_refused(tokenizer) -> None:
    renderer = PersonaRenderer(tokenizer, "system", system_prompt_style="none")
    assert renderer.render("Hi", "assistant").persona_applied == "none"
    with pytest.raises(InputError, match="nothing that carries 'Hamlet'"):
        renderer.render("Hi", "Hamlet")


def test_settings_are_refused_before_anything_is_rendered(tokenizer) -> None:
    with pytest.raises(InputError, match="persona_mode headers"):
        PersonaRenderer(tokenizer, "headers")
    with pytest.raises(InputError, match="system_prompt_style"):
        PersonaRenderer(tokenizer, system_prompt_style="you-are")


def test_blank_messages_and_messages_that_are_equal(renderer) -> None:
    for word in ("", " ", "\n\n", "assistant", "user", "Q", "zqx1marker1xqz", "<|im_end|>\n<|im_start|>assistant\n"):
        messages = [{"role": m["role"], "content": word} for m in TURNS]
        text = renderer.render(messages, "Hamlet").text
        turns = f"<|im_start|>user\n{word}<|im_end|>\n<|im_start|>Hamlet\n{word}<|im_end|>\n" * 2
        assert text.endswith(f"{turns}<|im_start|>user\n{word}<|im_end|>\n<|im_start|>Hamlet\n")


def test_a_template_that_treats_a_blank_answer_differently(bundled_folder: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.content.strip() %} {{ m.content.strip() }}{% endif %}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [*user("Hi"), {"role": "assistant", "content": " "}, *user("assistant:")]
    rendered = PersonaRenderer(speaking(bundled_folder, template), "header").render(messages, "Hamlet")
    assert rendered.text == "user: Hi\nHamlet:\nuser: assistant:\nHamlet:"


def test_thinking_that_a_template_leaves_out_of_earlier_answers(bundled_folder: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        + GENERATION
    )
    renderer = PersonaRenderer(speaking(bundled_folder, template), "header")
    answer = {"role": "assistant", "content": "<think>Hm.</think>\nSo."}
    rendered = renderer.render([*user("Hi"), answer, *user("Why?")], "Hamlet")
    assert "<|im_start|>Hamlet\n\nSo.<|im_end|>" in rendered.text
    ambiguous = {"role": "assistant", "content": "</think>x<|im_end|><|im_start|>user\nx"}
    with pytest.raises(InputError, match="cannot be followed"):
        renderer.render([*user("Hi"), ambiguous, *user("x")], "Hamlet")


def test_the_date_that_a_template_writes_stays_that_of_the_start(bundled_folder: Path) -> None:
    template = (
        "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + GENERATION
    )
    tokenizer = speaking(bundled_folder, template)
    stock = tokenizer.apply_chat_template(user("Hi"), tokenize=False, add_generation_prompt=True)
    assert PersonaRenderer(tokenizer).stock(user("Hi")) == stock
    earlier = PersonaRenderer(tokenizer, today=date(2001, 2, 3))
    assert earlier.render("Hi", "Hamlet").text.startswith("03 Feb 2001 ")


def test_of_several_templates_the_default_one_is_taken(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "x"}
    assert "<|im_start|>Hamlet\n" in PersonaRenderer(with_chat_template(tokenizer, None)).render("Hi", "Hamlet").text
    tokenizer.chat_template = {"tool_use": "x"}
    with pytest.raises(InputError, match="no chat template"):
        with_chat_template(tokenizer, None)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("writes_bos", [True, False])
def test_there_is_one_bos_where_the_model_wants_one(kind: str, adds_bos: bool, writes_bos: bool) -> None:
    tokenizer = family_tokenizer(kind, adds_bos)
    tokenizer.chat_template = LLAMA_LIKE if writes_bos else LLAMA_LIKE.removeprefix("{{ bos_token }}")
    renderer = PersonaRenderer(tokenizer)
    rendered = renderer.render("What is <s> rain?", "Hamlet")
    assert rendered.token_ids.count(tokenizer.bos_token_id) == (1 if adds_bos or writes_bos else 0)
    assert (rendered.token_ids[0] == tokenizer.bos_token_id) == (adds_bos or writes_bos)
    plain = renderer.render("What is rain?", "Hamlet")
    whole = tokenizer(plain.text, add_special_tokens=False)["input_ids"]
    assert list(plain.token_ids) == ([tokenizer.bos_token_id] if adds_bos and not writes_bos else []) + whole


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
@pytest.mark.parametrize("wanted", [True, False])
def test_thinking_is_asked_for_under_each_name(bundled_folder: Path, name: str, wanted: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = tokenizer.chat_template + f"{{% if {name} %}}<think>{{% endif %}}"
    rendered = PersonaRenderer(tokenizer, "system", thinking=wanted).render("Hi", "Hamlet")
    assert rendered.text.endswith("<think>") == wanted


def test_a_thinking_mark_is_never_taken_for_the_role(bundled_folder: Path) -> None:
    tokenizer = speaking(bundled_folder, by_role("user:", "<|asst|><think>", "<|asst|><think>"))
    tokenizer.add_tokens(["<|asst|>"], special_tokens=True)
    with pytest.raises(InputError, match="inside a special token"):
        PersonaRenderer(tokenizer, "header")


def test_a_token_spelled_through_a_normalizer_is_text_too(bundled_folder: Path) -> None:
    tokenizer = family_tokenizer("whole_words")
    tokenizer.chat_template = LLAMA_LIKE
    rendered = PersonaRenderer(tokenizer).render("\uff1cs\uff1e <|END|>", "\uff1c|end|\uff1e")
    benign = PersonaRenderer(tokenizer).render("Hi", "Hamlet")
    special = {i for token, i in tokenizer.get_added_vocab().items() if token != "<unk>"}
    assert [i for i in rendered.token_ids if i in special] == [i for i in benign.token_ids if i in special]
