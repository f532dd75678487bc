"""Settings of a steering run: what is asked, what acts, and what is counted in the answers."""

import math
from dataclasses import dataclass
from pathlib import Path

from src.common.errors import InputError
from src.common.intervention_config import InterventionConfigBase
from src.common.interventions import NAMED_POSITIONS
from src.common.settings import setting

AT_LEAST_ONE = ("num_tasks", "n_reps", "max_tokens", "batch_size", "top_k_mass_k")
GRID_FLAGS = ("coefficients", "relative", "positions")


@dataclass(kw_only=True)
class SteerSettings(InterventionConfigBase):
    """Fields of `src.steer`."""

    prompts_json: str = setting()
    """The prompts: JSON list, JSONL, CSV, Parquet or text file, or hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]."""
    coefficients: list[float] | None = None
    """A dose–response grid: an arm for each, in place of the coefficient of every --steer. 0 is the unsteered arm,
    which is there anyway."""
    relative: bool = False
    """The coefficients of --steer count in norms of the hidden state they are added to."""
    positions: str = setting("all", choices=NAMED_POSITIONS)
    """Which tokens --steer acts on."""
    random_control: bool = False
    """For each arm one more with random directions in place of its own, of the same lengths and mutual angles."""
    function_words: Path | None = None
    """JSON object of word lists, {"french": ["le", …], "english": […]}: how many words of each a response holds, and of
    which the most."""
    system_prompt: str | None = None
    """A system message before every prompt."""
    raw_prompts: bool = False
    """No chat template: the text itself, after the BOS token where the tokenizer has one (for base models)."""
    chat_template: str | None = None
    """Jinja file used instead of the model's own chat template, or `plain` for a base model that has none."""
    thinking_mode: bool = True
    """Ask templates that know it for thinking before the answer."""
    max_tokens: int = 128
    """Generated tokens at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature)."""
    n_reps: int = setting(1, aliases=("n_repeats",))
    """Repeats of each arm and prompt; at temperature 0 one, since all would be equal."""
    batch_size: int = setting(64, affects_rows=False)
    """Rows of any arms decoded at once, fewer where memory is short; results do not depend on it."""
    top_k_mass_k: int = 5
    """How many of the likeliest tokens the top-k mass adds up."""
    num_tasks: int | None = setting(None, affects_rows=False)
    """Only the first N prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature}: expected 0 or a positive number")
        if self.steer is None and self.interventions_path is None:
            raise InputError("nothing to steer with; expected --steer FILE:LAYERS:COEFFICIENT or --interventions_path")
        self._check_grid()
        if self.raw_prompts and (self.chat_template or self.system_prompt is not None):
            raise InputError(
                "--raw_prompts leaves no place for --chat_template or --system_prompt; leave it or them out"
            )

    def _check_grid(self) -> None:
        for name, default in zip(GRID_FLAGS, (None, False, "all"), strict=True):
            if self.steer is None and getattr(self, name) != default:
                raise InputError(f"--{name} goes with --steer; with --interventions_path write it into the spec")
        if self.coefficients is None:
            return
        for value in self.coefficients:
            if not math.isfinite(value):
                raise InputError(f"--coefficients {value}: expected finite numbers")
        if len(set(self.coefficients)) < len(self.coefficients):
            raise InputError(f"--coefficients {' '.join(map(str, self.coefficients))}: expected each once")
        if not any(self.coefficients):
            raise InputError("--coefficients names no coefficient but 0; expected at least one other")
