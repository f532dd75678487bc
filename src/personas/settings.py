"""Settings of a persona run: what is asked, of whom, and how."""

from dataclasses import dataclass
from pathlib import Path

from src.common.errors import InputError
from src.common.experiment_config import WorkerConfigBase
from src.common.intervention_config import InterventionConfigBase
from src.common.settings import require_at_least_one, setting
from src.common.system_prompts import check_style

AT_LEAST_ONE = ("num_tasks", "num_personae", "n_reps", "max_tokens", "batch_size", "top_k_mass_k")


@dataclass(kw_only=True)
class PersonaSettings(InterventionConfigBase, WorkerConfigBase):
    """Fields of `src.run_personas`."""

    prompts_json: str = setting()
    """The questions: JSON list, JSONL, CSV, Parquet or text file, or hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]."""
    personae_json: Path = setting()
    """Who answers: JSON list or JSONL of {"persona", "category", "article"}."""
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature)."""
    max_tokens: int = 1024
    """Generated tokens at most, per turn."""
    batch_size: int = setting(256, affects_rows=False)
    """Rows decoded at once, fewer where memory is short; results do not depend on it."""
    n_reps: int = setting(1, aliases=("n_repeats",))
    """Repeats of each persona and prompt; at temperature 0 one, since all would be equal."""
    top_k_mass_k: int = 5
    """How many of the likeliest tokens the top-k mass adds up."""
    thinking_mode: bool = True
    """Ask templates that know it for thinking before the answer."""
    system_prompt_style: str = "you-are-a"
    """you-are-a, act-as, none, or a text with {article} and {persona}."""
    persona_mode: str = setting("both", choices=("header", "system", "both"))
    """Where the persona is named: in every assistant header, in the system prompt, or in both."""
    chat_template: str | None = None
    """Jinja file used instead of the model's own chat template, or `plain` for a base model that has none."""
    turns: Path | None = None
    """Follow-up questions, asked one after another of the same persona; a file as for --prompts_json."""
    num_tasks: int | None = setting(None, affects_rows=False, affects_shares=True)
    """Only the first N prompts."""
    num_personae: int | None = setting(None, affects_rows=False, affects_shares=True)
    """Only the first N personas, after --categories."""
    categories: list[str] | None = None
    """Only personas of these categories."""
    token_arrays: bool = False
    """Also write tokens.parquet: every token's id, entropy and top-k mass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, AT_LEAST_ONE)
        if self.categories is not None and not self.categories:
            raise InputError("--categories is empty; expected at least one category, or leave it out for all")
        check_style(self.system_prompt_style)
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature}: expected 0 or a positive number")
