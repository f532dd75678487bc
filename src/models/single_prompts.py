"""Single prompts as token ids, in a chat or raw: of the commands that take prompts without personas."""

from datetime import date
from typing import Any, NamedTuple

from src.models.chat_format import PersonaRenderer, with_chat_template
from src.models.chat_format_tokens import GuardedTokenizer


class RenderedText(NamedTuple):
    """A prompt up to where the answer begins."""

    token_ids: tuple[int, ...]
    header: str
    """The template's last piece, which may open the answer's thinking; empty for raw prompts."""


class SinglePromptRenderer:
    """Renders texts, each once. Raises InputError as `PersonaRenderer` and `with_chat_template` do."""

    def __init__(
        self, tokenizer: Any, today: date, *, raw: bool, system_prompt: str | None, chat_template: str | None,
        thinking: bool,
    ) -> None:  # fmt: skip
        """raw: the text itself, after the BOS token where the tokenizer has one. today: for templates with a date."""
        self._system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self._bos = tokenizer.bos_token_id
        self._raw = GuardedTokenizer(tokenizer, "") if raw else None
        if self._raw is None:
            # No persona, so no header has to be proven: mode `system` takes every template.
            self._chat = PersonaRenderer(
                with_chat_template(tokenizer, chat_template), "system", thinking=thinking, today=today
            )
        self._known: dict[str, RenderedText] = {}

    @property
    def adds_bos(self) -> bool:
        """Whether raw prompts begin with a BOS."""
        return self._raw is not None and self._bos is not None

    def rendered(self, text: str) -> RenderedText:
        if text not in self._known:
            self._known[text] = RenderedText(raw_ids(self._raw, text), "") if self._raw else self._chat_turn(text)
        return self._known[text]

    def _chat_turn(self, text: str) -> RenderedText:
        prompt = self._chat.render([*self._system, {"role": "user", "content": text}])
        return RenderedText(prompt.token_ids, prompt.header)


def raw_ids(guard: GuardedTokenizer, text: str) -> tuple[int, ...]:
    """A text as it is, after the BOS token where the tokenizer has one. Raises InputError as `GuardedTokenizer`."""
    ids, bos = guard.encode([(text, False)]), guard.tokenizer.bos_token_id
    # Tokenizers of base models often leave it out, and the models were trained with it.
    has_bos = bos is None or ids[:1] == (bos,)
    return ids if has_bos else (bos, *ids)
