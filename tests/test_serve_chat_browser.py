"""The playground in a real Chromium: two answers side by side, coloured tokens, and no script of a model's runs."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from src.common.model_config import ModelSettings
from src.models.language_model import LanguageModel
from tests.browser import CHROMIUM, Watched
from tests.chat_server import Served, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path and no CHROMIUM variable")
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def ask(watched: Watched, question: str) -> None:
    watched.page.get_by_label("question").fill(question)
    watched.page.keyboard.press("Enter")
    watched.page.locator("#send:not([disabled])").wait_for()


def last_answers(watched: Watched) -> list[str]:
    return [watched.page.locator(f"#{side} .answer").last.inner_text() for side in ("steered", "unsteered")]


def test_two_answers_side_by_side_and_coloured(watched: Watched, served: Served) -> None:
    page = watched.page
    page.goto(f"{served.url}/")
    page.get_by_text("tiny, 2 layers").wait_for()
    page.get_by_label("tokens at most").fill("12")
    ask(watched, "Who are you?")
    steered, unsteered = last_answers(watched)
    assert steered == unsteered != ""
    page.get_by_label("layer", exact=True).select_option("1")
    slider = page.get_by_label("coefficient")
    slider.fill("12")
    assert page.locator(".steer output").inner_text() == "12"
    page.get_by_role("button", name="Clear").click()
    ask(watched, "Who are you?")
    steered, unsteered = last_answers(watched)
    assert steered != unsteered
    wanted = served.ask(steering=["one:1:12"], seed=1).json()["choices"][0]["message"]["content"]
    assert page.locator("#steered .answer").last.evaluate("each => each.textContent") == wanted
    tokens = page.locator("#steered .token")
    assert tokens.count() == 12
    colors = tokens.evaluate_all("all => all.map(each => [Number(each.dataset.entropy), each.style.background])")
    assert all(entropy > 0 and color for entropy, color in colors)
    assert "steered" in page.locator("#steered .note").last.inner_text()
    assert "not steered" in page.locator("#unsteered .note").last.inner_text()
    # The conversation goes on: what was said goes along.
    ask(watched, "And now?")
    assert [page.locator(f"#steered .{kind}").count() for kind in ("user", "answer", "error")] == [2, 2, 0]
    watched.assert_quiet()


def test_what_cannot_be_asked_is_said(watched: Watched, chat_model: LanguageModel) -> None:
    with serving(chat_model, {}, api_key="sesame-open") as served:
        watched.page.goto(f"{served.url}/")
        watched.page.get_by_text("send Authorization").wait_for()
        watched.page.get_by_label("key", exact=True).fill("sesame-open")
        watched.page.get_by_label("persona").click()
        watched.page.get_by_text("tiny, 2 layers").wait_for()
        assert watched.page.locator("#none").is_visible()
        watched.page.get_by_label("tokens at most").fill("0")
        ask(watched, "Who?")
        assert "max_tokens" in watched.page.locator("#steered .error").inner_text()
        assert watched.left == []


# In the page: this test's own clicks can come later than the answer's end on a busy machine.
STOP_SOON = """() => {
  const seen = new MutationObserver(() => {
    if (document.querySelectorAll("#steered .token").length > 3) {
      seen.disconnect();
      document.getElementById("stop").click();
    }
  });
  seen.observe(document.body, {childList: true, subtree: true});
}"""


def test_a_long_answer_can_be_stopped(watched: Watched, served: Served) -> None:
    watched.page.goto(f"{served.url}/")
    watched.page.get_by_text("tiny, 2 layers").wait_for()
    watched.page.get_by_label("tokens at most").fill("480")
    watched.page.get_by_label("question").fill("Tell a long story.")
    watched.page.evaluate(STOP_SOON)
    watched.page.get_by_role("button", name="Send").click()
    watched.page.get_by_text("stopped").first.wait_for()
    assert watched.page.locator("#steered .token").count() < 480
    watched.assert_quiet()


@pytest.fixture(scope="module")
def hostile(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A model that writes nothing but one token, which is markup with scripts."""
    folder = tmp_path_factory.mktemp("hostile")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens([HOSTILE])
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=512, **ends)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[tokenizer.convert_tokens_to_ids(HOSTILE)] = 1.0
    model.save_pretrained(folder)
    return LanguageModel.load(ModelSettings(model_id=str(folder)))


def test_what_a_model_writes_stays_text(watched: Watched, hostile: LanguageModel) -> None:
    with serving(hostile, {}) as served:
        watched.page.goto(f"{served.url}/")
        watched.page.get_by_text("tiny, 2 layers").wait_for()
        watched.page.get_by_label("tokens at most").fill("3")
        ask(watched, HOSTILE)
        assert last_answers(watched) == [HOSTILE * 3] * 2
        assert watched.page.title() == "Tiller: playground" and watched.page.locator(".turn img").count() == 0
        watched.assert_quiet()
