"""Settings of a steering run: what is asked, what acts, and what is counted in the answers."""

import math
from dataclasses import dataclass
from pathlib import Path

from src.common.capture_spec import CaptureSpec, parse_capture
from src.common.directions_file import HOOK_POINTS
from src.common.dose_config import DoseConfigBase
from src.common.errors import InputError
from src.common.settings import require_at_least_one, setting

AT_LEAST_ONE = ("num_tasks", "n_reps", "max_tokens", "batch_size", "top_k_mass_k", "parity")


@dataclass(kw_only=True)
class SteerSettings(DoseConfigBase):
    """Fields of `src.steer`."""

    prompts_json: str = setting()
    """The prompts: JSON list, JSONL, CSV, Parquet or text file, or hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]."""
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
    capture: str | None = None
    """vLLM: LAYERS[:all|last|mean|generated], the hidden states to keep of each row, after the interventions: those of
    all its tokens, of the prompt's last, their mean, or the answer's; in captures/."""
    capture_hook_points: list[str] | None = None
    """Where in those layers: resid_pre, resid_post, attn_out, mlp_out; resid_post unless given."""
    parity: int | None = setting(None, affects_rows=False)
    """vLLM: first run N prompts in all arms on transformers too, and end with exit code 1 where the two differ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, AT_LEAST_ONE)
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature}: expected 0 or a positive number")
        if self.steer is None and self.interventions_path is None:
            raise InputError("nothing to steer with; expected --steer FILE:LAYERS:COEFFICIENT or --interventions_path")
        self._check_vllm()
        if self.raw_prompts and (self.chat_template or self.system_prompt is not None):
            raise InputError(
                "--raw_prompts leaves no place for --chat_template or --system_prompt; leave it or them out"
            )

    @property
    def kept(self) -> CaptureSpec | None:
        """What --capture says."""
        return None if self.capture is None else parse_capture(self.capture)

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Where hidden states are captured."""
        return tuple(self.capture_hook_points or ("resid_post",))

    @property
    def only_vllm(self) -> str | None:
        """The flag that transformers cannot serve, None when there is none."""
        given = {"--capture": self.capture, "--parity": self.parity}
        return next((flag for flag, value in given.items() if value is not None), None)

    def refuse_transformers(self, reason: str) -> None:
        """Raises InputError when a flag needs vLLM."""
        if self.only_vllm:
            raise InputError(f"{self.only_vllm}: transformers it is ({reason}), which cannot; --backend vllm can")

    def _check_vllm(self) -> None:
        if self.backend == "hf":
            self.refuse_transformers("--backend hf")
        known = self.kept
        if self.capture_hook_points is None:
            return
        if known is None:
            raise InputError("--capture_hook_points goes with --capture")
        for name in self.hook_points:
            if name not in HOOK_POINTS or self.hook_points.count(name) > 1:
                raise InputError(f"--capture_hook_points {name}: expected some of {', '.join(HOOK_POINTS)}, each once")
