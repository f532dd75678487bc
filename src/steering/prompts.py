"""Prompts of a steering run as token ids."""

from datetime import date
from typing import Any, NamedTuple

from src.common.rows import Prompt
from src.models.chat_format import PersonaRenderer, with_chat_template
from src.models.chat_format_tokens import GuardedTokenizer
from src.steering.settings import SteerSettings


class Rendered(NamedTuple):
    """A prompt up to where the answer begins."""

    token_ids: tuple[int, ...]
    header: str
    """The template's last piece, which may open the answer's thinking; empty for raw prompts."""


class PromptRenderer:
    """Renders single prompts as the settings say, each once. Raises InputError as `PersonaRenderer` does."""

    def __init__(self, config: SteerSettings, tokenizer: Any, today: date) -> None:
        self.system_prompt = config.system_prompt
        self._bos = tokenizer.bos_token_id
        self._raw = GuardedTokenizer(tokenizer, "") if config.raw_prompts else None
        if self._raw is None:
            # No persona, so no header has to be proven: mode `system` takes every template.
            self._chat = PersonaRenderer(
                with_chat_template(tokenizer, config.chat_template),
                "system",
                thinking=config.thinking_mode,
                today=today,
            )
        self._known: dict[str, Rendered] = {}

    def rendered(self, prompt: Prompt) -> Rendered:
        if prompt.id not in self._known:
            self._known[prompt.id] = self._raw_text(prompt.text) if self._raw else self._chat_turn(prompt.text)
        return self._known[prompt.id]

    def _raw_text(self, text: str) -> Rendered:
        ids = tuple(self._raw.encode([(text, False)]))
        # Tokenizers of base models often leave it out, and the models were trained with it.
        has_bos = self._bos is None or ids[:1] == (self._bos,)
        return Rendered(ids if has_bos else (self._bos, *ids), "")

    def _chat_turn(self, text: str) -> Rendered:
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        prompt = self._chat.render([*system, {"role": "user", "content": text}])
        return Rendered(prompt.token_ids, prompt.header)
