"""The conversation behind a chat: streaming, stopping, personas in every header, steering, comparing."""

from pathlib import Path
from threading import Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.errors import InputError
from src.common.interventions import parse_steer
from src.common.system_prompts import parted
from src.interactive.answers import DIM, LABEL, PLAIN, AnswerPrinter, ending, entropy_color, harmless
from src.interactive.commands import command_of, unquoted
from src.interactive.making import Maker
from src.interactive.session import ChatSession, Watch
from src.interactive.settings import ChatSettings
from src.models.architectures import decoder_layers
from src.models.language_model import LanguageModel, generate_all
from src.models.streaming import TextStream, stream
from src.models.types import GenerationRequest
from tests.steering_specs import write_tiny_directions


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LanguageModel:
    return LanguageModel.load(ChatSettings(model_id=str(tiny_folder)))


def session_with(model: LanguageModel, **flags: object) -> ChatSession:
    return ChatSession(ChatSettings(**{"model_id": "m", "max_tokens": 6, "temperature": 0.0} | flags), model)


@pytest.fixture
def session(model: LanguageModel) -> ChatSession:
    return session_with(model)


def requests(n: int, **changed: object) -> list[GenerationRequest]:
    known = {"token_ids": (1, 5, 7, 9), "max_tokens": 12, "temperature": 1.0}
    return [GenerationRequest(**{"id": str(i), "seed": i} | known | changed) for i in range(n)]


def hooks(model: LanguageModel) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.model.modules())


def test_a_stream_is_what_generate_gives_token_by_token(model: LanguageModel) -> None:
    seen: dict[str, list[tuple[int, float]]] = {}
    results = stream(model, requests(3), on_token=lambda name, *rest: seen.setdefault(name, []).append(rest))
    assert results == generate_all(model, requests(3))
    for result in results:
        assert seen[result.id] == list(zip(result.token_ids, result.entropy, strict=True))


@pytest.mark.parametrize("asks", [0, 1, 2, 3, 9])
def test_a_stop_keeps_the_tokens_so_far_and_leaves_nothing_behind(model: LanguageModel, asks: int) -> None:
    whole = generate_all(model, requests(1))[0]
    answers = iter([False] * asks)
    before = hooks(model)
    result = stream(model, requests(1), on_token=lambda *_: None, should_stop=lambda: next(answers, True))[0]
    # Two layers ask once each a step.
    assert result.token_ids == whole.token_ids[: asks // 2] and result.finish_reason == "interrupted"
    assert hooks(model) == before and generate_all(model, requests(1))[0] == whole


def test_a_stop_takes_the_interventions_off(model: LanguageModel, tiny_folder: Path, tmp_path: Path) -> None:
    path = write_tiny_directions(tmp_path / "d.safetensors", tiny_folder)
    steered = requests(1, interventions=model.resolve([parse_steer(f"{path}:0:50")]))
    whole, before = generate_all(model, requests(1)), hooks(model)
    answers = iter([False] * 5)
    stream(model, steered, on_token=lambda *_: None, should_stop=lambda: next(answers, True))
    assert hooks(model) == before and generate_all(model, requests(1)) == whole != generate_all(model, steered)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=24) | st.text(max_size=24))
def test_streamed_text_is_the_decoded_text(model: LanguageModel, tokens: list[int] | str) -> None:
    if isinstance(tokens, str):
        tokens = model.tokenizer(tokens, add_special_tokens=False)["input_ids"]
    text = TextStream(model.decode)
    pieces = [text.add(token) for token in tokens]
    assert "".join(pieces) + text.rest() == model.decode(tokens)
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces)


def test_every_answer_in_the_context_is_headed_by_the_persona(model: LanguageModel) -> None:
    session = session_with(model, persona="a pirate", system="Be brief.")
    session.ask("who?", Watch())
    session.ask("why?", Watch())
    rendered = session._rendered("and now?")
    assert rendered.text.count("<|im_start|>pirate\n") == 3 and "<|im_start|>assistant" not in rendered.text
    assert rendered.system_prompt == "You are a pirate.\n\nBe brief."


def test_a_changed_persona_that_cannot_be_rendered_changes_nothing(model: LanguageModel) -> None:
    session = session_with(model, persona_mode="system", system_prompt_style="none")
    session.ask("who?", Watch())
    with pytest.raises(InputError, match="nothing that carries"):
        session.change(persona="Hamlet")
    assert session.label == "assistant" and len(session.messages) == 2


def test_no_room_for_an_answer_is_said_and_changes_nothing(session: ChatSession) -> None:
    session.ask("short", Watch())
    before = list(session.messages)
    with pytest.raises(InputError, match=r"the context is 512: no room for an answer, so it was not asked; /clear"):
        session.ask("word " * 600, Watch())
    assert session.messages == before
    # An answer that the context ends is told from one that the limit ends.
    session.change(max_tokens=4000)
    long = session.ask("word " * 450, Watch())
    assert long.fills_context and not session_with(session.model).ask("a", Watch()).fills_context


def test_retry_takes_other_draws_and_keeps_the_question(model: LanguageModel) -> None:
    session = session_with(model, temperature=1.0)
    with pytest.raises(InputError, match="nothing was asked"):
        session.retry(Watch())
    first = session.ask("who?", Watch())
    second = session.retry(Watch())
    assert first.result.token_ids != second.result.token_ids and len(session.messages) == 2
    assert session.messages[1]["content"] == second.span.response
    session.retry(Watch(should_stop=lambda: True))
    assert session.messages[1]["content"] == second.span.response
    session.ask("why?", Watch(should_stop=lambda: True))
    assert len(session.messages) == 2 and session.unanswered == "why?"
    session.retry(Watch())
    assert [m["content"] for m in session.messages[::2]] == ["who?", "why?"] and session.unanswered is None


THINKS_FIRST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}{# </think> #}"
)


def test_a_question_without_text_in_answer_can_be_asked_again_but_is_not_kept(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The session writes its template into the tokenizer, which other tests share.
    monkeypatch.setattr(model.tokenizer, "chat_template", model.tokenizer.chat_template)
    (tmp_path / "thinks.jinja").write_text(THINKS_FIRST)
    session = session_with(model, temperature=1.0, chat_template=str(tmp_path / "thinks.jinja"))
    answer = session.ask("why?", Watch())
    assert answer.result.token_ids and answer.span.truncated and not answer.is_kept
    assert ending(answer, session)[-1].startswith("the thinking did not end")
    assert (session.messages, session.unanswered) == ([], "why?")
    again = session.retry(Watch())
    assert again.result.token_ids != answer.result.token_ids and session.unanswered == "why?"
    session.clear()
    with pytest.raises(InputError, match="nothing was asked"):
        session.retry(Watch())


class Held:
    """Holds the model within a layer once, as the reading of a long prompt would."""

    def __init__(self, model: LanguageModel, calls: int) -> None:
        self.calls, self.inside, self.go_on = calls, Event(), Event()
        self.handle = decoder_layers(model.model)[0].register_forward_hook(self.wait)

    def wait(self, *_: object) -> None:
        self.calls -= 1
        if self.calls == 0:
            self.inside.set()
            assert self.go_on.wait(60)


@pytest.mark.parametrize("n_tokens", [0, 3])
def test_a_stop_within_a_layer_gives_the_answer_up_at_once(model: LanguageModel, n_tokens: int) -> None:
    whole, before, maker = generate_all(model, requests(1))[0], hooks(model), Maker(model)
    held, seen = Held(model, n_tokens + 1), []
    stopped = maker.make(
        requests(1), on_token=lambda name, token, _: seen.append(token),
        should_stop=lambda: held.inside.is_set() and len(seen) == n_tokens,
    )[0]  # fmt: skip
    assert not held.go_on.is_set(), "it waited for the layer"
    assert stopped.token_ids == tuple(seen) == whole.token_ids[:n_tokens] and stopped.finish_reason == "interrupted"
    assert stopped.text == model.decode(seen) and len(stopped.entropy) == n_tokens
    held.go_on.set()
    # The next answer begins when the one that was given up is over, and is as if that had never been.
    after = maker.make(requests(1), on_token=lambda *_: None, should_stop=lambda: False)[0]
    held.handle.remove()
    maker.close()
    assert after == whole and hooks(model) == before


def test_what_interrupts_the_one_who_waits_ends_the_answer(model: LanguageModel) -> None:
    maker, n_made = Maker(model), []

    def interrupted(*_: object) -> None:
        n_made.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        maker.make(requests(1, max_tokens=400), on_token=interrupted, should_stop=lambda: False)
    again = maker.make(requests(1), on_token=lambda *_: None, should_stop=lambda: False)
    maker.close()
    assert len(n_made) == 1 and again == generate_all(model, requests(1))
    with pytest.raises(InputError, match="the model's context 512"):
        Maker(model).make(requests(1, token_ids=(1,) * 600), on_token=interrupted, should_stop=lambda: False)


def test_compare_is_the_same_question_with_and_without(model: LanguageModel, tiny_folder: Path, tmp_path: Path) -> None:
    session = session_with(model, temperature=1.0)
    path = write_tiny_directions(tmp_path / "d.safetensors", tiny_folder)
    with pytest.raises(InputError, match="nothing steers"):
        session.compare("who?", Watch())
    session.steer([parse_steer(f"{path}:0:50")], ["it"])
    with pytest.raises(InputError, match="nothing was asked"):
        session.compare(None, Watch())
    _, steered, unsteered = session.compare("who?", Watch())
    assert session.messages == []
    assert session.ask("who?", Watch()).result.token_ids == steered.result.token_ids != unsteered.result.token_ids
    question, again, _ = session.compare(None, Watch())
    assert (question, again.result.token_ids) == ("who?", steered.result.token_ids) and len(session.messages) == 2
    session.unsteer()
    session.clear()
    session.n_asked = 0
    assert session.ask("who?", Watch()).result.token_ids == unsteered.result.token_ids
    with pytest.raises(InputError, match="layer"):
        session.steer([parse_steer(f"{path}:9:1")], ["it"])
    assert session.steering.spec is None


class Paper:
    """A screen that keeps what is written on it, by style."""

    def __init__(self) -> None:
        self.by_style: dict[str, str] = {}

    def write(self, text: str, style: str = "") -> None:
        self.by_style[style] = self.by_style.get(style, "") + text


@pytest.mark.parametrize("coloured", [False, True])
def test_thinking_is_dimmed_and_entropy_coloured(model: LanguageModel, coloured: bool) -> None:
    session, paper = session_with(model, entropy=coloured), Paper()
    session.reader.marks = ("<think>", "</think>")
    printer = AnswerPrinter(session, paper)
    printer.begin("")
    for number, token in enumerate(model.tokenizer("<think>hm</think>yes\x1b!")["input_ids"]):
        printer.add("answer", token, 0.1 if number % 2 else 5.0)
    assert paper.by_style[LABEL] == "assistant: "
    if coloured:
        assert set(paper.by_style) == {LABEL, entropy_color(0.1), entropy_color(5.0)}
    else:
        assert "hm" in paper.by_style[DIM] and paper.by_style[PLAIN].endswith("yes\\x1b!")
        assert "yes" not in paper.by_style[DIM] and "hm" not in paper.by_style[PLAIN]


def test_what_a_model_writes_cannot_steer_the_terminal() -> None:
    assert harmless("\x1b[2Ja\tb\n\x9bc\x07\r") == "\\x1b[2Ja\tb\n\\x9bc\\x07\\x0d"
    assert harmless("Grüße ☃ 中文") == "Grüße ☃ 中文"


def test_words_and_colours() -> None:
    assert [parted(text) for text in ("a pirate", "the Ghost", "Hamlet", "a", "  ")] == [
        ("pirate", "a"), ("Ghost", "the"), ("Hamlet", ""), ("a", ""), (None, ""),
    ]  # fmt: skip
    kept = ['"a', "'a\"", '"', '"a" and "b"']
    assert [unquoted(text) for text in ('""', "''", ' "a b" ', *kept)] == ["", "", "a b", *kept]
    assert command_of("/persona  a pirate ") == ("persona", "a pirate")
    with pytest.raises(InputError, match="did you mean /persona"):
        command_of("/perona x")
    assert len({entropy_color(value) for value in (0, 0.5, 1, 2, 3, 11)}) == 5


@pytest.mark.parametrize(
    "flags",
    [
        {"max_tokens": 0}, {"max_model_len": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"seed": -1},
        {"steer": ["a:1:2"], "interventions_path": Path("b")}, {"system_prompt_style": "who"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(flags: dict) -> None:
    with pytest.raises(InputError, match=r"expected|exclude"):
        ChatSettings(model_id="m", **flags)
