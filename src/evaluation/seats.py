"""Who is asked: a model under an arm as a persona, with all that turns messages into token ids for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from src.common.errors import InputError
from src.common.rows import Persona
from src.evaluation.settings import EvaluateSettings
from src.models.arms import Arm
from src.models.chat_format import Message, PersonaRenderer, RenderedPrompt, with_chat_template
from src.models.chat_format_tokens import GuardedTokenizer
from src.models.engine import bounded_context
from src.models.loading import context_length, load_config, load_tokenizer, resolve
from src.models.thinking import ThinkingReader


class Format:
    """How one model's prompts are made, from its files alone: no weights are read."""

    def __init__(
        self, config: EvaluateSettings, reference: str, today: date, renderers: dict[Path, PersonaRenderer]
    ) -> None:
        """
        today: for templates that write the date. renderers: by model folder, those that there are already; adapters of
        one base model share theirs. Raises InputError as `PersonaRenderer` and `resolve`.
        """
        one = config.of_model(reference)
        files = resolve(one)
        self.facts = files.facts
        if files.folder not in renderers:
            renderers[files.folder] = _renderer(config, files.folder, today)
        self.renderer = renderers[files.folder]
        self.context_length = bounded_context(one, context_length(load_config(files.folder, config.trust_remote_code)))

    @cached_property
    def reader(self) -> ThinkingReader:
        """What knows the marks of the model's thinking."""
        return ThinkingReader(self.renderer.tokenizer)

    @cached_property
    def _guard(self) -> GuardedTokenizer:
        tokenizer: Any = self.renderer.tokenizer
        template = tokenizer.chat_template
        return GuardedTokenizer(tokenizer, template if isinstance(template, str) else template["default"])

    def option_ids(self, prompt: RenderedPrompt, option: str) -> tuple[int, ...]:
        """
        The tokens of a given answer behind a prompt, its end left out: those that the tokenizer gives the whole text,
        or the answer's own where the prompt's end is cut otherwise with an answer behind it.
        """
        whole = self._guard.encode([(prompt.text, True), (option, False)])
        n = len(prompt.token_ids)
        if whole[:n] == prompt.token_ids and len(whole) > n:
            return whole[n:]
        alone, prefix = self._guard.encode([(option, False)]), tuple(self._guard.prefix)
        return alone[len(prefix) :] if prefix and alone[: len(prefix)] == prefix else alone


def _renderer(config: EvaluateSettings, folder: Path, today: date) -> PersonaRenderer:
    return PersonaRenderer(
        with_chat_template(load_tokenizer(folder, config.trust_remote_code), config.chat_template),
        # Without personas no header has to be proven, so that every template will do.
        config.persona_mode if config.personae_json else "system",
        system_prompt_style=config.system_prompt_style,
        thinking=config.thinking_mode,
        today=today,
    )


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A model under an arm as a persona."""

    reference: str
    arm: Arm
    persona: Persona | None
    format: Format

    @property
    def name(self) -> str:
        """Unique in a run."""
        return " ".join(
            [
                self.reference,
                *([f"as {self.persona.persona}"] if self.persona else []),
                *([] if self.arm.is_reference else [f"steered {self.arm.name}"]),
            ]
        )

    def prompt(self, messages: Sequence[Message]) -> RenderedPrompt:
        """The prompt's tokens, as training and every other command see them. Raises InputError as `render`."""
        who = (self.persona.persona, self.persona.article) if self.persona else (None, "")
        prompt = self.format.renderer.render(messages, *who)
        limit = self.format.context_length
        if limit is not None and len(prompt.token_ids) >= limit:
            raise InputError(
                f"a prompt has {len(prompt.token_ids)} tokens, and the context of {self.reference} is {limit}; shorten "
                f"or leave out {messages[-1]['content'][:60]!r}"
            )
        return prompt
