from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from src.common.errors import InputError
from src.common.system_prompts import system_prompt
from src.models.chat_format import PersonaRenderer, with_chat_template

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(str.strip)
CORPUS = ["You are Hamlet. What is rain? The assistant says hello, user and model.", "Why? Because. <s> </s>"] * 9
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
        or persona.lower() == "assistant"
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
         "assistant:{% endif %}", "several words"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:", "does not exist"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
         "before an earlier answer"),
        ("{{ messages[-1].content }}{% if add_generation_prompt %}assistant:{% endif %}", "drops or doubles"),
        ("{% if add_generation_prompt %}assistant:{% endif %}", "does not write a user's message"),
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


def made_tokenizer(kind: str, adds_bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE like Llama 3's, or a metaspace Unigram like Llama 2's, with or without a BOS of its own."""
    special = ["<s>", "</s>", "<unk>", "<|start|>", "<|end|>"]
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    else:
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence([])
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("writes_bos", [True, False])
def test_there_is_one_bos_where_the_model_wants_one(kind: str, adds_bos: bool, writes_bos: bool) -> None:
    tokenizer = made_tokenizer(kind, adds_bos)
    tokenizer.chat_template = LLAMA_LIKE if writes_bos else LLAMA_LIKE.removeprefix("{{ bos_token }}")
    rendered = PersonaRenderer(tokenizer, "both").render(user("What is <s> rain?"), "Hamlet", "")
    assert rendered.token_ids.count(tokenizer.bos_token_id) == (1 if adds_bos or writes_bos else 0)
    if adds_bos or writes_bos:
        assert rendered.token_ids[0] == tokenizer.bos_token_id
    plain = PersonaRenderer(tokenizer, "both").render(user("What is rain?"), "Hamlet", "")
    whole = tokenizer(plain.text, add_special_tokens=False)["input_ids"]
    assert list(plain.token_ids) == ([0] if adds_bos and not writes_bos else []) + whole


def test_the_date_is_the_one_that_is_given(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    for day in (1, 28):
        rendered = PersonaRenderer(tokenizer, "header", today=date(2026, 2, day)).render(user("Hi"), "Hamlet", "")
        assert rendered.text.startswith(f"{day:02d} Feb 2026 <|im_start|>")


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
@pytest.mark.parametrize("wanted", [True, False])
def test_thinking_is_asked_for_under_each_name(bundled_folder: Path, name: str, wanted: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = tokenizer.chat_template + f"{{% if {name} %}}<think>{{% endif %}}"
    rendered = PersonaRenderer(tokenizer, "system", thinking=wanted).render(user("Hi"), "Hamlet", "")
    assert rendered.text.endswith("<think>") == wanted


def test_another_case_of_the_role_word_is_another_persona(renderer) -> None:
    assert "<|im_start|>Assistant\n" in renderer.render(user("Hi"), "Assistant", "an").text
    assert "<|im_start|>assistant\n" in renderer.render(user("Hi"), "assistant", "an").text


def test_a_thinking_mark_is_never_taken_for_the_role(bundled_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.add_tokens(["<|asst|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|asst|><think>' if m.role == 'assistant' else 'user:' }}{{ m.content }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|asst|><think>{% endif %}"
    )
    with pytest.raises(InputError, match="inside a special token"):
        PersonaRenderer(tokenizer, "header")


def test_a_token_spelled_through_a_normalizer_is_refused(bundled_folder: Path) -> None:
    tokenizer = made_tokenizer("bytes", adds_bos=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=True)])
    tokenizer.chat_template = LLAMA_LIKE
    renderer = PersonaRenderer(tokenizer, "both")
    renderer.render(user("a think"), "Hamlet", "")
    with pytest.raises(InputError, match="reads a special token"):
        renderer.render(user("\uff1cthink\uff1e"), "Hamlet", "")
