"""Settings of a chat: who answers, how, and under which interventions."""

import math
from dataclasses import dataclass
from pathlib import Path

from src.common.errors import InputError
from src.common.experiment_config import MAX_SEED
from src.common.model_config import ModelSettings
from src.common.settings import require_at_least_one, setting
from src.common.system_prompts import check_style

AT_LEAST_ONE = ("max_tokens", "max_model_len")


@dataclass(kw_only=True)
class ChatSettings(ModelSettings):
    """Fields of `src.chat`."""

    persona: str | None = None
    """Who answers: named in every assistant header and in the system prompt. `a pirate` is the persona pirate with the
    article a."""
    system: str | None = None
    """A system message; it follows the persona's."""
    steer: list[str] | None = None
    """FILE:LAYERS:COEFFICIENT: add a file's directions to the hidden states of LAYERS (14, 8-12, 8,12, all or best), at
    all positions; several act together."""
    interventions_path: Path | None = None
    """An interventions spec, a JSON list, in place of --steer."""
    allow_model_mismatch: bool = False
    """Take directions of another model of the same shape."""
    thinking_mode: bool = True
    """Ask templates that know it for thinking before the answer."""
    max_tokens: int = 512
    """Generated tokens at most, per answer."""
    temperature: float = 0.7
    """0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature)."""
    max_model_len: int | None = None
    """Tokens of conversation and answer together at most; the model's context unless given."""
    persona_mode: str = setting("both", choices=("header", "system", "both"))
    """Where the persona is named: in every assistant header, in the system prompt, or in both."""
    system_prompt_style: str = "you-are-a"
    """you-are-a, act-as, none, or a text with {article} and {persona}."""
    chat_template: str | None = None
    """Jinja file used instead of the model's own chat template, or `plain` for a base model that has none."""
    entropy: bool = False
    """Colour each token by its entropy."""
    seed: int = 42
    """Seed of every draw."""

    def __post_init__(self) -> None:
        require_at_least_one(self, AT_LEAST_ONE)
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature}: expected 0 or a positive number")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"--seed {self.seed}: expected 0 to {MAX_SEED}")
        if self.steer is not None and self.interventions_path is not None:
            raise InputError("--steer and --interventions_path exclude each other; write all entries into the spec")
        check_style(self.system_prompt_style)
