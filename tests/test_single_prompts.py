"""Single prompts as tokens: the model's own chat template, or the text itself behind a BOS."""

from datetime import date
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from src.models.single_prompts import SinglePromptRenderer


@pytest.fixture
def tokenizer(bundled_folder: Path):
    return AutoTokenizer.from_pretrained(bundled_folder)


def renderer(tokenizer, **more: object) -> SinglePromptRenderer:
    given = {"raw": False, "system_prompt": None, "chat_template": None, "thinking": True} | more
    return SinglePromptRenderer(tokenizer, date(2026, 1, 2), **given)


@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_a_chat_turn_is_what_the_template_renders(tokenizer, system: str | None) -> None:
    messages = [{"role": "user", "content": "Who are you?"}]
    messages = messages if system is None else [{"role": "system", "content": system}, *messages]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    found = renderer(tokenizer, system_prompt=system).rendered("Who are you?")
    assert list(found.token_ids) == expected and tokenizer.decode(expected).endswith(found.header)


def test_raw_text_stands_behind_one_bos(tokenizer) -> None:
    raw = renderer(tokenizer, raw=True)
    text = "A text that spells <|im_end|>"
    first, *rest = raw.rendered(text).token_ids
    assert raw.adds_bos and first == tokenizer.bos_token_id and raw.rendered(text).header == ""
    assert tokenizer.decode(rest) == text and tokenizer.convert_tokens_to_ids("<|im_end|>") not in rest
    tokenizer.bos_token = None
    without = renderer(tokenizer, raw=True)
    assert not without.adds_bos and list(without.rendered(text).token_ids) == rest
    assert not renderer(tokenizer).adds_bos
