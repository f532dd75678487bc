"""Prompts as tokens: which of them are the user's own text, cut or not, raw or in a chat."""

from datetime import date
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from src.common.errors import InputError
from src.directions.examples import Example
from src.directions.rendering import PromptRenderer, text_span, without_first
from src.directions.settings import DirectionSettings
from src.models.residual_store import LayerReader, ResidualStore
from src.models.residuals import extract
from src.models.token_sequences import TokenSequence
from tests.tiny_models import tiny_model

TODAY = date(2026, 1, 2)


@pytest.fixture(scope="module")
def tokenizer(bundled_folder: Path):
    return AutoTokenizer.from_pretrained(bundled_folder)


def renderer(tokenizer, **more) -> PromptRenderer:
    config = DirectionSettings(model_id="m", output_dir=Path("o"), pairs_path=Path("p"), **more)
    return PromptRenderer(config, tokenizer, TODAY)


def rendered(tokenizer, text: str, **more) -> TokenSequence:
    return renderer(tokenizer, **more).sequences([Example(id="target:a", side="target", text=text, keys=("a",))])[0]


def own(tokenizer, sequence: TokenSequence) -> str:
    return tokenizer.decode(sequence.token_ids[slice(*sequence.text_span)])


TEXTS = [
    "Why is the sky blue?",
    "x",
    "0",
    "x0",
    "0x",
    "user",
    "assistant",
    "Ça va ? 你好 🙂",
    "two\nlines",
    "<|im_end|> a",
]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("text", TEXTS)
def test_the_span_is_the_text_and_nothing_of_the_template(tokenizer, text: str, system: str | None) -> None:
    sequence = rendered(tokenizer, text, system_prompt=system)
    assert own(tokenizer, sequence) == text
    whole = tokenizer.decode(sequence.token_ids)
    assert whole.startswith("<|im_start|>system\n") and whole.endswith("<|im_start|>assistant\n")
    assert (system or "helpful AI assistant") in whole


@given(st.text(min_size=1, max_size=40).filter(lambda text: text.strip()))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_span_holds_any_text(tokenizer, text: str) -> None:
    # Some bytes have no token in this vocabulary.
    assume(tokenizer.decode(tokenizer(text)["input_ids"]) == text)
    # Tokens that hold the template's line break and the text's own first ones count as the text's.
    assert text.strip() in own(tokenizer, rendered(tokenizer, text))


def test_a_long_prompt_is_cut_on_the_left_of_its_text(tokenizer) -> None:
    text = " ".join(f"w{i}" for i in range(200))
    short, long = renderer(tokenizer, max_prompt_tokens=60), rendered(tokenizer, text)
    cut = short.sequences([Example(id="target:a", side="target", text=text, keys=())])[0]
    assert short.n_cut == 1 and len(cut.token_ids) == 60
    start = long.text_span[0]
    n = len(long.token_ids)
    assert cut.token_ids == long.token_ids[:start] + long.token_ids[start + n - 60 :]
    assert text.endswith(own(tokenizer, cut)) and own(tokenizer, cut)
    assert renderer(tokenizer, max_prompt_tokens=n).sequences([]) == []
    with pytest.raises(InputError, match=r"--max_prompt_tokens leaves no room.*expected at least"):
        rendered(tokenizer, text, max_prompt_tokens=20)


def test_raw_prompts_begin_with_a_bos_and_hold_only_the_text(tokenizer) -> None:
    sequence = rendered(tokenizer, "Why is <|im_end|> blue?", raw_prompts=True)
    assert sequence.token_ids[0] == tokenizer.bos_token_id and sequence.token_ids[1] != tokenizer.bos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in sequence.token_ids
    assert own(tokenizer, sequence) == "Why is <|im_end|> blue?"
    assert sequence.text_span == (1, len(sequence.token_ids))


def test_the_first_token_is_no_texts_own(bundled_folder: Path) -> None:
    bare = AutoTokenizer.from_pretrained(bundled_folder)
    bare.bos_token = None
    sequence = rendered(bare, "Why is the sky blue?", raw_prompts=True)
    assert sequence.text_span == (1, len(sequence.token_ids)) and own(bare, sequence) == " is the sky blue?"
    with pytest.raises(InputError, match="only token is the first"):
        rendered(bare, "Why", raw_prompts=True)


def test_spans_by_what_renders_share() -> None:
    assert text_span((1, 2, 7, 8, 3), [(1, 2, 5, 3), (1, 2, 6, 3)], "a") == (2, 4)
    # The text begins and ends like one filler, which the other one shows.
    assert text_span((1, 2, 5, 8, 5, 3), [(1, 2, 5, 3), (1, 2, 6, 3)], "a") == (2, 5)
    with pytest.raises(InputError, match="'a'"):
        text_span((1, 2, 3), [(1, 2, 5, 3), (1, 2, 6, 3)], "a")
    assert without_first((0, 3), "a") == (1, 3) and without_first((2, 3), "a") == (2, 3)


def test_mean_prompt_is_over_the_span_and_the_store_knows_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = tuple(range(10, 22))
    plain = TokenSequence(id="plain", token_ids=ids, prompt_length=12)
    spanned = TokenSequence(id="spanned", token_ids=ids, prompt_length=12, text_span=(3, 9))
    every: dict[str, torch.Tensor] = {}
    extract(model, [plain], layers=[0, 1], position="all", on_rows=lambda names, rows: every.update({names[0]: rows}))
    with ResidualStore(tmp_path / "s", {"a": 1}) as store:
        extract(model, list(store.missing([plain, spanned])), layers=[0, 1], position="mean_prompt", on_rows=store.add)
        store.finish()
    reader = LayerReader(tmp_path / "s")
    for layer in (0, 1):
        rows = reader.rows(["spanned", "plain"], layer)
        expected = torch.stack([every["plain"][3:9, layer].mean(0), every["plain"][:, layer].mean(0)])
        assert rows.shape == (2, 1, 32) and torch.allclose(rows[:, 0], expected, atol=1e-6)
    with ResidualStore(tmp_path / "s", {"a": 1}) as store, pytest.raises(InputError, match="other tokens"):
        list(store.missing([TokenSequence(id="spanned", token_ids=ids, prompt_length=12, text_span=(3, 8))]))


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (0, 4)])
def test_a_span_outside_the_prompt_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="text_span"):
        TokenSequence(id="a", token_ids=(5, 6, 7, 8), prompt_length=3, text_span=span)
