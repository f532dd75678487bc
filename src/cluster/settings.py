"""Settings of src.experiment."""

from dataclasses import dataclass
from pathlib import Path

from src.common.errors import InputError
from src.common.settings import setting
from src.common.sources import nearest

ACTIONS = ("plan", "submit", "status", "summarize", "cancel", "archive", "check")


@dataclass(kw_only=True)
class ExperimentSettings:
    """The experiment"""

    words: list[str] = setting(positional=True)
    """plan experiment.toml, or submit, status, summarize, cancel or archive FOLDER, or check. May stand without the
    flag."""
    output_dir: Path | None = None
    """Folder of the experiment that `plan` makes."""
    history: Path | None = None
    """Folder with earlier runs, from which `plan` estimates; the folder above the experiment's unless given."""
    validate: bool = True
    """Have `plan` run every command with --show_config."""
    local: bool = False
    """Have `submit` run everything in processes of this machine, without SLURM."""
    at_once: int = 1
    """Of --local: runs side by side."""
    most: int | None = None
    """Have `submit` submit at most N runs."""
    watch: bool = False
    """Have `status` go on until all runs have ended; Ctrl-C ends the watching alone."""
    seconds: float = 10.0
    """Of --watch, between two looks."""
    yes: bool = False
    """Do what `cancel` and `archive` would ask for."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise InputError(f"{self.action!r}: the nearest is {nearest(self.action, ACTIONS)!r}; {', '.join(ACTIONS)}")
        expected = {"plan": "an experiment.toml", "check": None}.get(self.action, "the folder of an experiment")
        if len(self.words) != 1 + bool(expected):
            raise InputError(f"{self.action} takes {expected or 'nothing'} after it; got {self.words[1:]}")
        if (self.action == "plan") != (self.output_dir is not None):
            raise InputError("--output_dir is for `plan`, which needs it" if self.action == "plan" else
                             f"--output_dir is for `plan`; write {self.action} FOLDER")  # fmt: skip
        if self.at_once < 1 or (self.most is not None and self.most < 1) or self.seconds <= 0:
            raise InputError("--at_once, --most and --seconds: expected numbers above 0")

    @property
    def action(self) -> str:
        """The first word."""
        return self.words[0]

    @property
    def place(self) -> Path:
        """The second word."""
        return Path(self.words[1])
