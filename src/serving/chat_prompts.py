"""From the body of a request to what an engine is asked."""

import threading
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from src.common.capture_spec import Capture, parse_capture
from src.common.directions_file import HOOK_POINTS
from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedSpec
from src.common.results import row_seed
from src.common.system_prompts import parted
from src.models.chat_format import PersonaRenderer, with_chat_template
from src.models.chat_format_tokens import GuardedTokenizer
from src.models.engine import Engine
from src.models.single_prompts import raw_ids
from src.models.types import GenerationRequest
from src.serving.chat_bodies import CaptureField, ChatBody, CompletionBody
from src.serving.chat_captures import Onto, projected_onto
from src.serving.chat_directions import DirectionsRegister
from src.serving.settings import ChatServerSettings


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request for answers asks of the engine: one request a choice."""

    requests: tuple[GenerationRequest, ...]
    n: int
    """Choices of each prompt; they follow one another."""
    header: str = ""
    """What a chat's prompt ends with; empty for raw prompts."""
    is_chat: bool
    persona_applied: str = "none"
    onto: tuple[Onto, ...] = ()
    """The directions that what is kept is projected on."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a client cannot know otherwise: what was done, and the seed of each choice."""
        spec = self.requests[0].spec
        return {
            "steering": spec.fingerprint if spec else None, "persona_applied": self.persona_applied,
            "seeds": [request.seed for request in self.requests],
        }  # fmt: skip


class Prompts:
    """Makes what is asked. It may be called from several threads, which it lets in one after another."""

    def __init__(self, config: ChatServerSettings, engine: Engine, register: DirectionsRegister) -> None:
        """Raises InputError for a chat template that cannot be read or used."""
        self._config, self._engine, self._register = config, engine, register
        self._today = date.today()
        self._lock = threading.Lock()
        self._n_asked = 0
        self._raw = GuardedTokenizer(engine.tokenizer, "")
        self._no_chat: str | None = None
        self._with_persona: PersonaRenderer | None = None
        try:
            with_chat_template(engine.tokenizer, config.chat_template)
            # Without a persona no header has to be proven: mode `system` takes every template.
            self._plain = PersonaRenderer(
                engine.tokenizer, "system", thinking=config.thinking_mode, today=self._today
            )  # fmt: skip
        except InputError as error:
            if config.chat_template is not None:
                raise
            self._no_chat = str(error)

    def of_chat(self, body: ChatBody, name: str) -> Asked:
        """A chat completion's requests. name: unique. Raises InputError for what cannot be asked as it is."""
        with self._lock:
            if self._no_chat:
                raise InputError(f"{self._no_chat}, or ask /v1/completions")
            persona, article = _who(body)
            renderer = self._plain if persona is None else self._persona_renderer()
            prompt = renderer.render(body.turns(), persona, article)
            limit = body.max_completion_tokens or body.max_tokens or self._config.max_tokens
            one = self._request(body, name, prompt.token_ids, limit, self._register.resolve(body.steering))
            return Asked(
                requests=_choices(one, body.n), n=body.n, header=prompt.header, is_chat=True,
                persona_applied=prompt.persona_applied, onto=self._onto(body.capture),
            )  # fmt: skip

    def of_completion(self, body: CompletionBody, name: str) -> Asked:
        """A completion's requests, those of the first prompt first. name: unique. Raises InputError as `of_chat`."""
        with self._lock:
            requests: list[GenerationRequest] = []
            spec = self._register.resolve(body.steering)
            for i, prompt in enumerate(body.prompts()):
                ids = tuple(prompt) if isinstance(prompt, list) else raw_ids(self._raw, prompt)
                if not ids:
                    raise InputError("prompt: it has no token; expected at least one")
                one = self._request(body, f"{name}.{i}", ids, body.max_tokens, spec)
                requests += _choices(one, body.n)
            return Asked(requests=tuple(requests), n=body.n, is_chat=False, onto=self._onto(body.capture))

    def _persona_renderer(self) -> PersonaRenderer:
        if self._with_persona is None:
            self._with_persona = PersonaRenderer(
                self._engine.tokenizer, self._config.persona_mode, thinking=self._config.thinking_mode,
                system_prompt_style=self._config.system_prompt_style, today=self._today,
            )  # fmt: skip
        return self._with_persona

    def _request(
        self,
        body: ChatBody | CompletionBody,
        name: str,
        ids: tuple[int, ...],
        max_tokens: int,
        spec: ResolvedSpec | None,
    ) -> GenerationRequest:
        self._n_asked += 1
        return GenerationRequest(
            id=name, token_ids=ids, max_tokens=max_tokens, temperature=body.temperature,
            seed=row_seed(self._config.seed, str(self._n_asked)) if body.seed is None else body.seed,
            interventions=spec or (), capture=self._capture(body.capture, len(ids)),
        )  # fmt: skip

    def _capture(self, field: CaptureField | None, prompt_length: int) -> Capture | None:
        if field is None:
            return None
        if field.hook_point not in HOOK_POINTS:
            raise InputError(f"capture.hook_point {field.hook_point[:60]!r}: expected {', '.join(HOOK_POINTS)}")
        try:
            spec = parse_capture(f"{field.layers}:{field.positions}")
            return spec.of(prompt_length, self._engine.n_layers, (field.hook_point,))
        except InputError as error:
            raise InputError(str(error).replace("--capture", "capture", 1)) from None

    def _onto(self, field: CaptureField | None) -> tuple[Onto, ...]:
        if field is None:
            return ()
        places = self._capture(field, 1).places
        return projected_onto(places, {name: self._register.named(name) for name in field.directions})


def _who(body: ChatBody) -> tuple[str | None, str]:
    if body.persona is None:
        return None, ""
    if not isinstance(body.persona, str):
        return body.persona.persona, body.persona.article
    persona, article = parted(body.persona)
    if persona is None:
        raise InputError("persona: it is empty; expected a name, or leave it out")
    return persona, article


def _choices(one: GenerationRequest, n: int) -> tuple[GenerationRequest, ...]:
    """The first choice is what n = 1 gives."""
    more = [replace(one, id=f"{one.id}/{i}", seed=row_seed(one.seed, f"choice {i}")) for i in range(1, n)]
    return (one, *more)
