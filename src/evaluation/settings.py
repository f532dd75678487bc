"""Settings of an evaluation: which models, tasks and personas, and how they are asked."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from src.common.dose_config import DoseConfigBase
from src.common.errors import InputError
from src.common.intervention_config import InterventionConfigBase
from src.common.settings import require_at_least_one, setting
from src.common.system_prompts import check_style

JUDGE = "judge"
"""The folder of what a judge answered, in the run's."""
AT_LEAST_ONE = ("num_tasks", "num_personae", "n_reps", "max_tokens", "batch_size", "top_k_mass_k")


@dataclass(kw_only=True)
class EvaluateSettings(DoseConfigBase):
    """Fields of `src.evaluate`."""

    model_id: list[str] = setting(aliases=("model",))
    """Hub ids, local folders or bundled:smollm2-135m, each perhaps with +ADAPTER_PATH; the others are compared with the
    first."""
    tasks: list[str] = setting(aliases=("task",))
    """FILE.jsonl (its settings in FILE.task.json, or FILE.jsonl@SCORER), my_task.py@NAME, or inspect_evals/NAME."""
    personae_json: Path | None = None
    """Every task as each of these personas: JSON list or JSONL of {"persona", "category", "article"}."""
    num_personae: int | None = setting(None, affects_rows=False)
    """Only the first N personas."""
    system_prompt_style: str = "you-are-a"
    """you-are-a, act-as, none, or a text with {article} and {persona}."""
    persona_mode: str = setting("both", choices=("header", "system", "both"))
    """Where the persona is named: in every assistant header, in the system prompt, or in both."""
    chat_template: str | None = None
    """Jinja file used instead of the model's own chat template, or `plain` for a base model that has none."""
    thinking_mode: bool = True
    """Ask templates that know it for thinking before the answer."""
    temperature: float | None = None
    """0 takes the likeliest token; what the task says unless given, and 0 where it says nothing."""
    max_tokens: int | None = None
    """Generated tokens at most; what the task says unless given, and 512 where it says nothing."""
    n_reps: int | None = setting(None, aliases=("n_repeats", "epochs"))
    """How often each sample is asked; what the task says unless given."""
    num_tasks: int | None = setting(None, affects_rows=False)
    """Only the first N samples of each task."""
    batch_size: int = setting(64, affects_rows=False)
    """Samples decoded at once, fewer where memory is short; results do not depend on it."""
    top_k_mass_k: int = 5
    """How many of the likeliest tokens the top-k mass adds up."""

    judge_model_id: str | None = None
    """The judge of the scorer judge, and the grader of inspect-ai tasks that want one: provider:model as in src.ask."""
    judge_rubric: Path | None = None
    """The rubric of judged tasks whose header names none; data/rubrics/ has some."""
    judge_base_url: str | None = None
    """The judge's server, where that is your own and speaks OpenAI's protocol."""
    judge_temperature: float | None = None
    """The judge's sampling temperature; nothing is sent unless given. Its answers are kept in <output_dir>/judge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, AT_LEAST_ONE)
        for name in ("model_id", "tasks"):
            values = getattr(self, name)
            if not values:
                raise InputError(f"--{name} is empty; expected at least one")
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise InputError(f"--{name} {twice[0]}: named twice; expected each once")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature}: expected 0 or a positive number")
        for name in ("judge_rubric", "judge_base_url", "judge_temperature"):
            if getattr(self, name) is not None and self.judge_model_id is None:
                raise InputError(f"--{name} without --judge_model_id: nobody judges; give both")
        if self.project_onto is not None:
            raise InputError("--project_onto: evaluations measure no projections; src.steer does")
        if self.adapter_path is not None and len(self.model_id) > 1:
            raise InputError("--adapter_path with several models: write each as --model_id X+ADAPTER_PATH")
        check_style(self.system_prompt_style)

    def of_model(self, reference: str, *, adapter: bool = True) -> InterventionConfigBase:
        """The settings with which one of the models is loaded; `adapter=False`: without --adapter_path."""
        names = [field.name for field in fields(InterventionConfigBase) if field.init]
        values = {name: getattr(self, name) for name in names} | {"model_id": reference}
        return InterventionConfigBase(**(values if adapter else values | {"adapter_path": None}))
