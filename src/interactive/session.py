"""A conversation with its settings: what is asked, of whom, under which interventions. No terminal here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

from src.common.errors import InputError
from src.common.interventions import Entry
from src.common.resolved_interventions import ResolvedSpec
from src.common.results import row_seed
from src.common.system_prompts import parted
from src.interactive.making import Maker
from src.interactive.settings import ChatSettings
from src.models.chat_format import Message, PersonaRenderer, RenderedPrompt, with_chat_template
from src.models.language_model import LanguageModel
from src.models.thinking import ThinkingReader, ThinkingSpan
from src.models.types import GenerationRequest, GenerationResult


@dataclass(frozen=True, kw_only=True)
class Manner:
    """Who answers and how; a changed copy takes its place, so that what is refused leaves it as it was."""

    persona: str | None = None
    article: str = ""
    system: str | None = None
    thinking: bool
    max_tokens: int
    temperature: float
    entropy: bool


class Answer(NamedTuple):
    """One answer as it ended."""

    result: GenerationResult
    span: ThinkingSpan
    room: int | None
    """Tokens that the context had left for it, None without a bound."""

    @property
    def is_kept(self) -> bool:
        """Whether it has text, thinking left out."""
        return bool(self.span.response.strip())

    @property
    def fills_context(self) -> bool:
        """Whether the context ended the answer, not the limit on its tokens."""
        return self.result.finish_reason == "length" and len(self.result.token_ids) == self.room


@dataclass
class Watch:
    """What is done while an answer is made."""

    on_begin: Callable[[str], None] = lambda header: None
    """What the prompt ends with, which may already open the answer's thinking."""
    on_token: Callable[[str, int, float], None] = lambda name, token, entropy: None
    """Name of the answer, token id, entropy in nats."""
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class Steering:
    """The interventions that act."""

    entries: list[Entry] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    """Each as it was given."""
    spec: ResolvedSpec | None = None


class ChatSession:
    """The conversation so far: earlier questions and answers, and what the next one is asked with."""

    def __init__(self, config: ChatSettings, model: LanguageModel) -> None:
        """Raises InputError for a persona or a template that cannot be rendered, and for directions that do not fit."""
        self.config = config
        self.model = model
        self.today = date.today()
        self.tokenizer = with_chat_template(model.tokenizer, config.chat_template)
        self.reader = ThinkingReader(self.tokenizer)
        self.messages: list[Message] = []
        self.unanswered: str | None = None
        """The last question, where it is not among the messages since it has no answer."""
        self.n_asked = 0
        self._maker = Maker(model)
        self.saved: Path | None = None
        """The file that this session wrote last."""
        self.steering = Steering()
        self.manner = Manner(
            thinking=config.thinking_mode, max_tokens=config.max_tokens, temperature=config.temperature,
            entropy=config.entropy,
        )  # fmt: skip
        self.renderer = self._renderer(self.manner)
        persona, article = parted(config.persona or "")
        self.change(persona=persona, article=article, system=config.system or None)

    @property
    def label(self) -> str:
        """Who answers."""
        return self.manner.persona or "assistant"

    def change(self, **changed: object) -> None:
        """Other settings of `Manner` from the next answer on. Raises InputError, and leaves all as it was."""
        manner = replace(self.manner, **changed)
        renderer = self._renderer(manner)
        # Shows that persona and system prompt can be rendered before anything is given up for them.
        renderer.render(self._conversation(manner, [], "x"), manner.persona, manner.article)
        self.manner, self.renderer = manner, renderer

    def clear(self) -> None:
        """Forget the conversation; who answers and how stays."""
        self.go_on_with([])

    def go_on_with(self, messages: list[Message]) -> None:
        """Questions and answers in turn take the place of the conversation."""
        self.messages, self.unanswered = messages, None

    def close(self) -> None:
        """Wait until nothing is computed any more."""
        self._maker.close()

    def steer(self, entries: Sequence[Entry], told: Sequence[str]) -> None:
        """Take these interventions besides those that act. Raises InputError where one does not fit the model."""
        every = [*self.steering.entries, *entries]
        spec = self.model.resolve(every, self.config.allow_model_mismatch)
        self.steering = Steering(every, [*self.steering.told, *told], spec)

    def unsteer(self) -> None:
        """No interventions from the next answer on."""
        self.steering = Steering()

    def ask(self, question: str, watch: Watch) -> Answer:
        """
        Answer a question; both are part of the conversation from then on, an answer that was stopped with the text it
        had. A question without any text in answer is not: a chat holds no empty messages.

        Raises InputError when the conversation leaves no room for an answer; it is then as it was before.
        """
        prompt = self._rendered(question)
        request = self._request("answer", prompt, self.steering.spec, self.n_asked)
        self.n_asked += 1
        watch.on_begin(prompt.header)
        result = self._maker.make([request], on_token=watch.on_token, should_stop=watch.should_stop)[0]
        answer = self._answer(result, prompt)
        if answer.is_kept:
            turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.span.response}]
            self.go_on_with([*self.messages, *turn])
        else:
            self.unanswered = question
        return answer

    def retry(self, watch: Watch) -> Answer:
        """
        Answer the last question again, with other draws. Raises InputError when there is none; when the new answer has
        no text the old one stays.
        """
        question, earlier = self._last("/retry: nothing was asked yet; ask first")
        kept, unanswered = self.messages, self.unanswered
        self.messages = earlier
        try:
            return self.ask(question, watch)
        finally:
            if self.messages == earlier:
                self.messages, self.unanswered = kept, unanswered

    def compare(self, question: str | None, watch: Watch) -> tuple[str, Answer, Answer]:
        """
        A question, or the last one again, answered under the interventions and without them, from the same draws; the
        conversation stays as it was. Returns (question, steered, unsteered).

        Raises InputError without interventions, without a question, and when the context has no room.
        """
        if self.steering.spec is None:
            raise InputError("/compare: nothing steers; /steer FILE:LAYERS:COEFFICIENT first")
        kept, number = self.messages, self.n_asked
        if question is None:
            question, self.messages = self._last("/compare: nothing was asked yet; ask first, or /compare QUESTION")
            # The last answer's own draws, so that it is one of the two as long as nothing else has changed.
            number = self.n_asked - 1
        try:
            prompt = self._rendered(question)
        finally:
            self.messages = kept
        asked = [
            self._request("steered", prompt, self.steering.spec, number),
            self._request("unsteered", prompt, None, number),
        ]
        steered, unsteered = self._maker.make(asked, on_token=watch.on_token, should_stop=watch.should_stop)
        return question, self._answer(steered, prompt), self._answer(unsteered, prompt)

    def _last(self, refusal: str) -> tuple[str, list[Message]]:
        """The last question and the conversation before it."""
        if self.unanswered is not None:
            return self.unanswered, self.messages
        if not self.messages:
            raise InputError(refusal)
        return self.messages[-2]["content"], self.messages[:-2]

    def _renderer(self, manner: Manner) -> PersonaRenderer:
        # Without a persona no header has to be proven: mode `system` takes every template.
        mode = self.config.persona_mode if manner.persona else "system"
        return PersonaRenderer(
            self.tokenizer, mode, system_prompt_style=self.config.system_prompt_style, thinking=manner.thinking,
            today=self.today,
        )  # fmt: skip

    @staticmethod
    def _conversation(manner: Manner, earlier: Sequence[Message], question: str) -> list[Message]:
        system = [{"role": "system", "content": manner.system}] if manner.system else []
        return [*system, *earlier, {"role": "user", "content": question}]

    def _rendered(self, question: str) -> RenderedPrompt:
        messages = self._conversation(self.manner, self.messages, question)
        prompt = self.renderer.render(messages, self.manner.persona, self.manner.article)
        n, limit = len(prompt.token_ids), self.model.context_length
        if limit and n >= limit:
            raise InputError(
                f"the conversation has {n} tokens with this question, and the context is {limit}: no room for an "
                f"answer, so it was not asked; /clear begins anew, /save FILE first keeps it"
            )
        return prompt

    def _request(self, name: str, prompt: RenderedPrompt, spec: ResolvedSpec | None, number: int) -> GenerationRequest:
        """number: of the question; its draws depend on it."""
        return GenerationRequest(
            id=name, token_ids=prompt.token_ids, max_tokens=self.manner.max_tokens,
            temperature=self.manner.temperature, seed=row_seed(self.config.seed, str(number)),
            interventions=spec or (),
        )  # fmt: skip

    def _answer(self, result: GenerationResult, prompt: RenderedPrompt) -> Answer:
        limit = self.model.context_length
        room = limit - len(prompt.token_ids) if limit else None
        return Answer(result, self.reader.read(result.token_ids, prompt.header), room)
