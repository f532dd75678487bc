"""Settings of judging: what, by which rubrics, by whom."""

from dataclasses import dataclass
from pathlib import Path

from src.common.api_config import ApiConfigBase
from src.common.errors import InputError
from src.common.rubrics import WITHOUT_LOGPROBS
from src.common.settings import setting


@dataclass(kw_only=True)
class JudgeSettings(ApiConfigBase):
    """Fields of `src.judge`."""

    results_path: Path = setting()
    """The rows to judge: the results.jsonl of a run, or any JSONL, JSON, CSV or Parquet file."""
    rubrics: list[Path] = setting()
    """Rubric files; data/rubrics/ has some."""
    fill: list[str] | None = None
    """NAME=TEXT: what stands for {NAME} in the rubrics in place of a column."""
    score_from: str = setting("auto", choices=("auto", "probabilities", "text"))
    """Rubrics of probabilities: auto asks for log-probabilities and reads the text where none come; text never asks;
    probabilities leaves a row unscored without them."""
    min_mass: float = 0.25
    """Rubrics of probabilities: an answer is unscored where less than this probability is on the numbers."""
    group_by: list[str] | None = setting(None, affects_rows=False)
    """Columns of the rows; the summary holds a mean for each of their values too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for pair in self.fill or []:
            if "=" not in pair:
                raise InputError(f"--fill {pair}: expected NAME=TEXT")
        if not 0 <= self.min_mass <= 1:
            raise InputError(f"--min_mass {self.min_mass}: expected a probability from 0 to 1")
        provider = self.model_id.partition(":")[0]
        if self.score_from == "probabilities" and provider in WITHOUT_LOGPROBS:
            raise InputError(f"--score_from probabilities: {provider} gives no log-probabilities; take text")

    @property
    def filled(self) -> dict[str, str]:
        """The values of --fill by name."""
        pairs = [pair.partition("=") for pair in self.fill or []]
        return {name: text for name, _, text in pairs}
