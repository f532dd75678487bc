"""Settings of an extraction: what is contrasted, how a direction is made of it, and what is scored."""

import re
from dataclasses import dataclass
from pathlib import Path

from src.common.directions_file import HOOK_POINTS
from src.common.engine_config import EngineConfigBase
from src.common.errors import InputError
from src.common.intervention_fields import parse_layers
from src.common.settings import require_at_least_one, setting

SINGLE = ("mean_difference", "median_of_means", "logistic")
"""Methods that make one direction a layer."""
SEVERAL = ("mean_and_pca", "cones")
"""Methods that with one direction would be the mean difference under another name."""
METHODS = ("mean_difference", "median_of_means", "pca", *SEVERAL, "logistic", "ensemble")
POSITION = re.compile(r"last_prompt|mean_prompt|mean_response|token:-[1-9][0-9]*")
AT_LEAST_ONE = ("n_directions", "n_preserve", "max_prompt_tokens", "tokens_per_batch", "num_tasks")
SOURCES = ("--positive_path with --negative_path", "--pairs_path", "--positive_run with --where", "--import_path")


@dataclass(kw_only=True)
class DirectionSettings(EngineConfigBase):
    """Fields of `src.extract_directions`."""

    positive_path: str | None = None
    """Target prompts, which show the behaviour: JSON list, JSONL, CSV, Parquet or text file, or
    hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]."""
    negative_path: str | None = None
    """Control prompts, which do not."""
    paired: bool = False
    """Line i of both files is a pair: they stay on one side of the split, and pca takes their differences."""
    pairs_path: Path | None = None
    """Instead: rows with both sides, {"positive", "negative"}, perhaps an "id"; a JSON list, JSONL, CSV or Parquet."""
    positive_run: Path | None = None
    """Instead: results.jsonl of a finished persona run; its prompts are rendered again as the run did, its responses
    follow them."""
    where: list[str] | None = None
    """FIELD=VALUE: rows of the run that are targets, those for which all of these hold."""
    negative_where: list[str] | None = None
    """FIELD=VALUE: rows of the run that are controls; every row that is no target unless given."""
    import_path: Path | None = None
    """Instead of extracting: a .gguf, .npz or .pt file to convert into a directions file of this model."""
    export: list[str] | None = setting(None, choices=("gguf", "npz", "pt"), affects_rows=False)
    """Also write the directions in these formats of other tools."""
    method: str = setting("mean_difference", choices=METHODS)
    """How a layer's direction is made of the hidden states of both classes."""
    n_directions: int = 1
    """Directions a layer, orthonormal; more than one with pca, mean_and_pca and cones."""
    token_position: str | None = None
    """last_prompt, mean_prompt (over the user's own text: template, special tokens and the first token left out),
    mean_response (with --positive_run) or token:-k, the k-th from the prompt's end; last_prompt unless given,
    mean_response with --positive_run."""
    hook_point: str = setting("resid_post", choices=HOOK_POINTS)
    """Where in a decoder block the hidden states are read."""
    layers: str = "all"
    """14, 8-12, 8,12 or all."""
    project_out: str = setting("none", choices=("none", "control_mean"))
    """control_mean takes the direction's part along the control class' mean out of it."""
    preserve_path: str | None = None
    """Prompts of something that the directions must leave alone: its directions against --preserve_against_path are
    taken out of ours."""
    preserve_against_path: str | None = None
    """What those prompts are contrasted with."""
    n_preserve: int = 5
    """How many directions to take out: their mean difference and principal directions."""
    val_fraction: float = 0.2
    """Share of the prompts held out, of which all scores are."""
    winsorize_quantile: float = 1.0
    """Clamp each hidden state's coordinates at this quantile of their absolute values before estimating; 1 does not."""
    logistic_c: float | None = 1.0
    """Inverse penalty of logistic, as scikit-learn's C on rows of mean squared length 1; none chooses it at each layer
    by 5-fold cross-validation on the fitted prompts."""
    ensemble_methods: list[str] = setting(
        default_factory=lambda: ["mean_difference", "logistic"], choices=(*SINGLE, "pca")
    )
    """Methods whose directions ensemble adds up."""
    ensemble_weights: list[float] | None = None
    """Their weights; equal unless given."""
    system_prompt: str | None = None
    """A system prompt before every prompt."""
    chat_template: str | None = None
    """Jinja file used instead of the model's own chat template, or `plain`."""
    thinking_mode: bool = True
    """Ask templates that know it for thinking before the answer."""
    raw_prompts: bool = False
    """Prompts as they are, without a chat template and after a BOS if the tokenizer has one: for base models."""
    max_prompt_tokens: int = 512
    """Longer prompts are cut on the left of the user's text; those of a run never."""
    num_tasks: int | None = None
    """Only the first N prompts of each class, or the first N pairs or rows of the run."""
    tokens_per_batch: int | None = setting(None, affects_rows=False)
    """Tokens run at once, more is faster where there is memory; 2048 on transformers, on vLLM its own choice, unless
    given."""
    reduction: str = setting("pca", choices=("pca", "umap"), affects_rows=False)
    """How the report draws the hidden states in two dimensions: pca at every layer, umap at one."""
    report_layer: int | None = setting(None, affects_rows=False)
    """The layer that the report opens at; the best one unless given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, AT_LEAST_ONE)
        if not 0 < self.val_fraction < 1:
            raise InputError(f"--val_fraction {self.val_fraction}: expected a share between 0 and 1")
        if not 0 < self.winsorize_quantile <= 1:
            raise InputError(f"--winsorize_quantile {self.winsorize_quantile}: expected more than 0, at most 1")
        if self.compiled:
            raise InputError("--compiled: a compiled model keeps no hidden states; leave it out")
        if self.logistic_c is not None and not 0 < self.logistic_c < float("inf"):
            raise InputError(f"--logistic_c {self.logistic_c}: expected a positive number, or none")
        self._check_source()
        self._check_method()
        self._parsed_layers()
        if self.token_position is None:
            self.token_position = "mean_response" if self.positive_run else "last_prompt"
        if self.import_path is None:
            self._check_position()

    def _check_source(self) -> None:
        given = [
            self.positive_path is not None or self.negative_path is not None,
            self.pairs_path is not None,
            self.positive_run is not None,
            self.import_path is not None,
        ]
        if sum(given) != 1:
            found = " and ".join(source for source, is_given in zip(SOURCES, given, strict=True) if is_given)
            raise InputError(f"{found or 'no prompts'}: expected one of {'; '.join(SOURCES)}")
        for one, other in (("positive_path", "negative_path"), ("preserve_path", "preserve_against_path"),
                           ("positive_run", "where")):  # fmt: skip
            for name, needed in ((one, other), (other, one)):
                if getattr(self, name) is not None and getattr(self, needed) is None:
                    raise InputError(f"--{name} {getattr(self, name)}: expected --{needed} with it")
        if self.negative_where is not None and self.positive_run is None:
            raise InputError(f"--negative_where {self.negative_where}: expected --positive_run with it")
        for flag in ("where", "negative_where"):
            for text in getattr(self, flag) or []:
                if not re.fullmatch(r"[^=\s]+=.*", text, re.DOTALL):
                    raise InputError(f"--{flag} {text!r}: expected FIELD=VALUE, for example persona=Hamlet")
        if self.paired and self.positive_path is None:
            raise InputError("--paired is for --positive_path and --negative_path; leave it out")
        if "gguf" in (self.export or []) and self.hook_point != "resid_post":
            raise InputError(f"--export gguf: a control vector is added to resid_post, not to {self.hook_point}")
        self._check_rendering()

    def _check_rendering(self) -> None:
        own = [name for name in ("system_prompt", "chat_template") if getattr(self, name) is not None]
        own += ["raw_prompts"] if self.raw_prompts else []
        if self.positive_run is not None and own:
            raise InputError(f"--{own[0]}: the prompts of --positive_run are rendered as the run did; leave it out")
        if self.positive_run is not None and self.preserve_path is not None:
            raise InputError("--preserve_path: its prompts and the responses of --positive_run are not alike; drop one")
        if self.raw_prompts and len(own) > 1:
            raise InputError(f"--raw_prompts has no place for --{own[0]}; drop one of them")

    def _check_method(self) -> None:
        k, method = self.n_directions, self.method
        if k > 1 and method in (*SINGLE, "ensemble"):
            raise InputError(f"--n_directions {k}: {method} makes one; take pca, {' or '.join(SEVERAL)}")
        if k == 1 and method in SEVERAL:
            raise InputError(f"--n_directions 1: {method} with one is the mean difference; expected at least 2")
        weights, methods = self.ensemble_weights, self.ensemble_methods
        if len(set(methods)) < len(methods) or len(methods) < 2:
            raise InputError(f"--ensemble_methods {' '.join(methods)}: expected at least two, each once")
        if weights is not None and len(weights) != len(methods):
            raise InputError(f"--ensemble_weights: {len(weights)} for {len(methods)} methods; expected one each")
        if weights is not None and not all(0 < weight < float("inf") for weight in weights):
            raise InputError(f"--ensemble_weights {' '.join(map(str, weights))}: expected positive numbers")

    def _check_position(self) -> None:
        if not POSITION.fullmatch(self.token_position):
            raise InputError(
                f"--token_position {self.token_position}: expected last_prompt, mean_prompt, mean_response or token:-k"
            )
        if self.token_position == "mean_response" and self.positive_run is None:
            raise InputError(
                "--token_position mean_response: prompts have no response; expected --positive_run with it"
            )

    @property
    def local_paths(self) -> list[Path]:
        """The files that the settings name and that must be there, a persona run's results among them."""
        prompts = (self.positive_path, self.negative_path, self.preserve_path, self.preserve_against_path)
        files = [Path(path) for path in prompts if path is not None and not path.startswith("hub:")]
        files += [path for path in (self.pairs_path, self.import_path) if path is not None]
        if self.positive_run is not None:
            files.append(self.positive_run / "results.jsonl" if self.positive_run.is_dir() else self.positive_run)
        return files

    def _parsed_layers(self) -> tuple[int, ...] | str:
        try:
            layers = parse_layers(self.layers)
        except ValueError as error:
            raise InputError(f"--layers {error}") from None
        if layers == "best":
            raise InputError("--layers best: which layer is best is found here; expected 14, 8-12, 8,12 or all")
        return layers

    def wanted_layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers to make directions of. Raises InputError for one that the model lacks, the report's too."""
        parsed = self._parsed_layers()
        layers = tuple(range(n_layers)) if parsed == "all" else parsed
        if layers[-1] >= n_layers:
            raise InputError(f"--layers {self.layers}: layer {layers[-1]}; the model's layers are 0 to {n_layers - 1}")
        if layers == (0,) and "gguf" in (self.export or []):
            raise InputError(
                f"--export gguf: a control vector cannot hold layer 0, the only one of --layers {self.layers}"
            )
        if self.report_layer is not None and self.report_layer not in layers:
            raise InputError(f"--report_layer {self.report_layer}: expected one of --layers {self.layers}")
        return layers
