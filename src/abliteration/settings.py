"""Settings of an abliteration: prompts, what may be edited, how trials are judged, and how many there are."""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from src.common.errors import InputError
from src.common.intervention_fields import parse_layers
from src.common.model_config import ModelConfigBase
from src.common.settings import require_at_least_one, setting

METHODS = ("mean_difference", "median_of_means", "pca", "mean_and_pca", "cones", "logistic", "ensemble")
NORMS = ("none", "column", "row")
COMPONENTS = ("attn", "mlp")
SCORERS = ("markers", "nli", "judge")
SAVES = ("model", "adapter", "none")
AT_LEAST_ONE = (
    "n_trials", "n_startup_trials", "trials_per_batch", "n_directions", "kl_tokens", "response_tokens", "n_search",
    "n_report", "batch_size", "num_tasks", "check_tokens",
)  # fmt: skip
OF_EXTRACTION = ("preserve_prompts", "method", "n_directions", "token_position", "project_out")
"""Settings by which directions are made, which those of a file are already."""
HEADS = re.compile(r"(\d+):(\d+(?:,\d+)*)")


@dataclass(kw_only=True)
class AbliterateSettings(ModelConfigBase):
    """Fields of `src.abliterate`."""

    target_prompts: str = setting()
    """Prompts that show the behaviour: JSON list, JSONL, CSV, Parquet or text file, or
    hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]."""
    control_prompts: str = setting()
    """Prompts that do not, whose answers are to stay as they are."""
    markers_path: Path | None = None
    """Phrases by which a response shows the behaviour: a text file, one a line, or a JSON list."""
    scorer: str = setting("markers", choices=SCORERS)
    """What decides whether a response shows the behaviour: markers, nli (a zero-shot classifier) or judge (a model
    behind an API)."""
    nli_model_id: str | None = None
    """The classifier of --scorer nli: a hub id or a folder of a model for natural language inference."""
    nli_hypothesis: str | None = None
    """What the classifier is asked of each response, for example "The assistant declines to answer."."""
    judge_model_id: str | None = None
    """The model of --scorer judge, provider:model as in src.judge."""
    judge_rubric: Path | None = None
    """Its rubric, a choice whose first word means that the behaviour shows, on {response} alone; for example
    data/rubrics/declines.txt."""
    judge_base_url: str | None = None
    """Its server, where that is your own and speaks OpenAI's protocol."""
    preserve_prompts: str | None = None
    """Prompts of something that the edit must leave alone: its directions against the control prompts are taken out of
    ours."""
    directions_path: Path | None = None
    """Directions of this model at all layers; extracted into <output_dir>/directions unless given. Prompts that they
    were extracted from are left out, and the others are for the search and for the report, half each at most."""
    method: str = setting("mean_difference", choices=METHODS)
    """How directions are extracted, as in src.extract_directions."""
    n_directions: int = 1
    """Directions a layer; more than one with pca, mean_and_pca and cones."""
    token_position: str = "last_prompt"
    """Where hidden states are read: last_prompt, mean_prompt or token:-k."""
    project_out: str = setting("none", choices=("none", "control_mean"))
    """control_mean takes the part along the control prompts' mean out of the directions."""
    components: list[str] = setting(default_factory=lambda: list(COMPONENTS), choices=COMPONENTS)
    """Whose output weights are edited: attention's, the feed-forward parts', or both."""
    heads: list[str] | None = None
    """LAYER:HEAD[,HEAD…]: only these heads are edited, those of values in linear attention, and no attention of other
    layers."""
    norm: str = setting("none", choices=NORMS)
    """Lengths that an edit keeps: none, those of a weight's columns (what each input adds), or of its rows."""
    min_weight: float = 0.0
    """Least edit weight that is tried; below 0 a behaviour is strengthened."""
    max_weight: float = 1.5
    """Greatest edit weight that is tried; 1 removes a direction whole, 2 reflects at it."""
    calibrate: bool = False
    """Multiply each layer's edit weight by the share of the target prompts' projection that the control prompts do not
    have, (target mean − control mean) / target mean, so that weight 1 brings the one to the other. Each layer is then
    edited by its own direction."""
    induce: str | None = None
    """FILE:LAYERS:COEFFICIENT: in every trial also add a file's directions to what the feed-forward parts of LAYERS
    write."""
    n_trials: int = setting(200, affects_rows=False)
    """Trials in all; more can be added later."""
    n_startup_trials: int | None = None
    """Trials drawn at random before the search learns from them; a quarter of --n_trials, 60 at most, unless given."""
    trials_per_batch: int = 1
    """Trials side by side in one batch, which a GPU takes gladly; each is told only what was known before it."""
    kl_tokens: int = 32
    """Tokens of the model's own continuation over which KL is taken."""
    response_tokens: int = 100
    """Length of the responses that are judged."""
    max_kl: float = 1.0
    """Nats per token; a trial above it is not answered with, and counts as showing the behaviour everywhere."""
    gates: bool = True
    """Stop a trial as soon as no answer can bring it to the front; false measures every trial in full."""
    n_search: int = 80
    """Prompts of each kind that trials are judged on, at most; 30 % of them unless there are more."""
    n_report: int = 80
    """Prompts of each kind kept for the report, on which nothing is chosen; 30 % at most."""
    storage: str | None = setting(None, affects_rows=False)
    """Optuna's storage, for example sqlite:///study.db, which several processes can share; a journal in the run's
    folder unless given."""
    study_name: str = setting("abliteration", affects_rows=False)
    """Name of the study in it."""
    stale_seconds: float = setting(120.0, affects_rows=False)
    """A trial of a shared study whose process has been silent so long is run by another one."""
    warm_start: str | None = None
    """A run's folder or an Optuna URL with a study of --study_name: the best points of it are tried first."""
    select: str = setting("auto", affects_rows=False)
    """auto, ask or the number of a trial on the front; auto takes the least KL among those within one response (or
    2.5 %) of the fewest that show the behaviour, counted or expected."""
    save: str = setting("model", choices=SAVES, affects_rows=False)
    """model writes all of an edited model, adapter a LoRA (--norm none, without --induce and --adapter_path)."""
    push_to_hub: str | None = setting(None, affects_rows=False)
    """Repository on the hub to upload what was saved to, private unless --public."""
    public: bool = setting(False, affects_rows=False)
    """Make that repository public."""
    validate_text: Path | None = setting(None, affects_rows=False)
    """A text file whose perplexity is taken before and after."""
    validate_tasks: list[str] | None = setting(None, affects_rows=False)
    """Tasks of src.evaluate that the model before and the saved one after are put through; with --save model."""
    check_tokens: int | None = setting(None, affects_rows=False)
    """Answer the report's prompts to this length, unless it is --response_tokens: what shows only later is counted."""
    evaluate_only: bool = False
    """Compare --model_id with --edited_model_id on the report's prompts, and search nothing."""
    edited_model_id: str | None = None
    """The other model of --evaluate_only."""
    system_prompt: str | None = None
    """A system message before every prompt."""
    chat_template: str | None = None
    """Jinja file used instead of the model's own chat template, or `plain` for a base model that has none."""
    raw_prompts: bool = False
    """No chat template: the text itself."""
    thinking_mode: bool = True
    """Ask templates that know it for thinking before the answer."""
    batch_size: int = setting(64, affects_rows=False)
    """Rows decoded at once, fewer where memory is short."""
    compile: bool = setting(False, affects_rows=False)
    """Compile the model's norms, each into one kernel; needs a C++ compiler. On a CPU that saved nothing, on a GPU it
    was not measured."""
    num_tasks: int | None = None
    """Only the first N prompts of each kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, AT_LEAST_ONE)
        if not -10 <= self.min_weight < self.max_weight <= 10:
            raise InputError(
                f"--min_weight {self.min_weight} --max_weight {self.max_weight}: expected the first smaller, both "
                f"within ±10"
            )
        if not 0 < self.max_kl < float("inf") or not 0 < self.stale_seconds < float("inf"):
            raise InputError(f"--max_kl {self.max_kl} --stale_seconds {self.stale_seconds}: expected positive numbers")
        if len(set(self.components)) < len(self.components):
            raise InputError(f"--components {' '.join(self.components)}: expected each once")
        if self.select not in ("auto", "ask") and not self.select.isdecimal():
            raise InputError(f"--select {self.select}: expected auto, ask or the number of a trial")
        if self.validate_tasks and (self.save != "model" or self.evaluate_only):
            raise InputError("--validate_tasks: expected --save model, whose folder is evaluated")
        if self.push_to_hub and (self.save == "none" or self.evaluate_only):
            raise InputError("--push_to_hub: expected --save model or adapter, which is what is uploaded")
        if self.public and not self.push_to_hub:
            raise InputError("--public: expected --push_to_hub REPO with it")
        if self.evaluate_only != (self.edited_model_id is not None):
            raise InputError("--evaluate_only and --edited_model_id go together; give both or neither")
        self._check_scorer()
        self._check_edit()
        self._refuse_idle_extraction()

    def _check_scorer(self) -> None:
        if self.scorer == "markers" and self.markers_path is None:
            raise InputError("--markers_path: expected a file of phrases by which a response shows the behaviour")
        for name in ("nli_model_id", "nli_hypothesis"):
            if (getattr(self, name) is not None) != (self.scorer == "nli"):
                raise InputError(f"--scorer {self.scorer}: expected --{name} with nli and without it only then")
        for name in ("judge_model_id", "judge_rubric"):
            if (getattr(self, name) is not None) != (self.scorer == "judge"):
                raise InputError(f"--scorer {self.scorer}: expected --{name} with judge and without it only then")

    def _check_edit(self) -> None:
        self.parsed_heads()
        self.parsed_induce()
        if self.heads and "attn" not in self.components:
            raise InputError("--heads: attention is not among --components")
        if self.save == "adapter" and (self.norm != "none" or self.induce):
            raise InputError("--save adapter: a LoRA holds only --norm none without --induce; take --save model")
        if self.save == "adapter" and self.adapter_path and not self.evaluate_only:
            raise InputError(
                "--save adapter: it would not hold what --adapter_path does; take --save model, which does"
            )
        if self.calibrate and self.n_directions > 1:
            raise InputError("--calibrate: expected one direction a layer, whose projections it compares")

    def _refuse_idle_extraction(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in OF_EXTRACTION:
            value = getattr(self, name)
            if self.directions_path is not None and value != defaults[name]:
                raise InputError(
                    f"--{name} {value}: nothing is extracted where --directions_path {self.directions_path} is given; "
                    f"leave out one of them, or give it to src.extract_directions, which makes such a file"
                )

    def parsed_heads(self) -> dict[int, tuple[int, ...]] | None:
        """Layer → heads, None for all."""
        if self.heads is None:
            return None
        found: dict[int, tuple[int, ...]] = {}
        for text in self.heads:
            match = HEADS.fullmatch(text)
            if not match or int(match[1]) in found:
                raise InputError(f"--heads {text!r}: expected LAYER:HEAD[,HEAD…], each layer once, for example 14:0,3")
            found[int(match[1])] = tuple(sorted({int(head) for head in match[2].split(",")}))
        return found

    def parsed_induce(self) -> tuple[Path, tuple[int, ...] | str, float] | None:
        """The file, its layers and the coefficient of --induce."""
        if self.induce is None:
            return None
        file, _, rest = self.induce.partition(":")
        layers, _, coefficient = rest.partition(":")
        try:
            parsed = Path(file), parse_layers(layers), float(coefficient)
        except ValueError:
            raise InputError(f"--induce {self.induce!r}: expected FILE:LAYERS:COEFFICIENT") from None
        if not math.isfinite(parsed[2]):
            raise InputError(f"--induce {self.induce!r}: a coefficient of {coefficient}; expected a finite number")
        return parsed
