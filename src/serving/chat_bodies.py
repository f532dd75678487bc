"""
What may stand in a request for an answer. Fields that would change an answer and that the engines lack are refused
unless they hold what changes nothing, and so is every field that is not known: a misspelt `steering` must not give
unsteered text.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from src.common.errors import InputError
from src.common.sources import nearest
from src.serving.bodies import Body
from src.serving.errors import ApiError

MAX_SEED = 2**63 - 1
NEUTRAL: dict[str, tuple] = {
    "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "frequency_penalty": (0,), "presence_penalty": (0,),
    "repetition_penalty": (1,), "logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"), "best_of": (1,),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "echo": (False,), "suffix": ("",),
    "reasoning_effort": (), "verbosity": (), "audio": (), "web_search_options": (),
}  # fmt: skip
"""Fields of OpenAI's that would change an answer and that the engines lack, with the values that change nothing."""
OF_DRAWING = ("top_p", "top_k", "min_p")
"""They change nothing either where the likeliest token is taken."""
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
    *("prediction", "prompt_cache_retention"),
)
"""Fields of OpenAI's that change no answer."""
OF_A_MESSAGE = ("refusal", "annotations", "audio", "tool_calls", "function_call", "reasoning_content", "reasoning")
"""What answers bring along beside their text: harmless when empty; earlier thinking is never shown to a model again."""
MOST_CHOICES = 16


class TextPart(Body):
    """A part of a message that is a list of parts."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _leave_out_the_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        thinking = ("reasoning_content", "reasoning")
        left = {k: v for k, v in value.items() if not (k in OF_A_MESSAGE and (not v or k in thinking))}
        return left | ({"content": ""} if value.get("role") == "assistant" and value.get("content") is None else {})

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class PersonaField(Body):
    """A persona as in a file of personas."""

    persona: Annotated[str, Field(min_length=1, max_length=1000)]
    article: Annotated[str, Field(max_length=100)] = ""


class CaptureField(Body):
    """Which hidden states to summarize."""

    layers: str
    """`14`, `8-12`, `8,12` or `all`."""
    positions: Literal["all", "last", "generated"] = "all"
    """Of all tokens, of the prompt's last, or of the answer's."""
    hook_point: str = "resid_post"
    directions: Annotated[list[str], Field(max_length=64, default_factory=list)]
    """Names of registered directions to project on."""


class StreamOptions(Body):
    """Of streamed answers."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Answering(Body):
    model: str
    temperature: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 1.0
    """0 takes the likeliest token."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Of the draws; the answer says which seed it had."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    steering: Annotated[list[str | dict[str, Any]], Field(max_length=64, default_factory=list)]
    """Interventions: `NAME:LAYERS:COEFFICIENT` of registered directions, or entries of an interventions spec with a
    registered name as directions_path."""
    uncertainty: bool = False
    """Return entropy (nats) and top-k mass of each token."""
    capture: CaptureField | None = None
    """Return norms and projections of hidden states."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_changes_nothing(cls, value: Any) -> Any:
        return _understood(value, cls.model_fields) if isinstance(value, dict) else value

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.stops) > 16 or not all(self.stops):
            raise ValueError("stop: expected at most 16 texts, none of them empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only of streamed answers; set stream")
        if self.stops and self.capture is not None:
            raise ValueError("capture: of answers that run to their own end only; leave out stop")
        return self


class ChatBody(_Answering):
    """A chat completion."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    persona: str | PersonaField | None = None
    """Who answers: `Hamlet`, `a pirate`, or an object of persona and article."""

    def turns(self) -> list[dict[str, str]]:
        """The conversation, system messages that follow one another as one."""
        turns: list[dict[str, str]] = []
        for each in self.messages:
            role = "system" if each.role == "developer" else each.role
            if turns and role == turns[-1]["role"] == "system":
                turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n\n{each.text}"}
            else:
                turns.append({"role": role, "content": each.text})
        return turns


class CompletionBody(_Answering):
    """A completion of raw text, or of token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 16

    def prompts(self) -> list[str | list[int]]:
        """Each text, or list of token ids. Raises InputError where there is none, or too many."""
        many = isinstance(self.prompt, list) and (not self.prompt or not isinstance(self.prompt[0], int))
        prompts = list(self.prompt) if many else [self.prompt]
        if not 1 <= len(prompts) * self.n <= 128:
            raise InputError(f"prompt: {len(prompts)} prompts and n {self.n}; expected 1 to 128 answers")
        return prompts


class DirectionsBody(Body):
    """Directions to register."""

    name: str
    path: str
    """Of a directions file, relative to a folder that the server was given."""


def _understood(value: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The fields of a body that are ours. Raises ApiError for one that would change the answer, or is not known."""
    given = {name: each for name, each in value.items() if each is not None}
    is_greedy = given.get("temperature") == 0
    for name in [name for name in given if name not in fields]:
        if name in NEUTRAL:
            if not _is_one_of(given[name], NEUTRAL[name]) and not (is_greedy and name in OF_DRAWING):
                lacking = (
                    f"{name}: {_shown(given[name])} would change the answer, and the engines lack it; leave it out"
                )
                raise ApiError(400, lacking, param=name, code="unsupported")
        elif name not in IGNORED:
            known = [*fields, *NEUTRAL, *IGNORED]
            unknown = f"{name[:60]}: no such field; the nearest is {nearest(name, known)}"
            raise ApiError(400, unknown, param=name[:60], code="unknown_field")
        del given[name]
    return given


def _is_one_of(value: object, neutral: tuple) -> bool:
    # In Python 0 is equal to False, and `logprobs: 0` asks for something.
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:59] + "…"
