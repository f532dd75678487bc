"""The tasks of a steering run: arms × prompts × repeats."""

from collections.abc import Sequence
from dataclasses import dataclass

from src.common.results import make_id
from src.common.rows import Prompt
from src.models.arms import UNSTEERED, Arm


@dataclass(frozen=True)
class Task:
    """One response."""

    arm: Arm
    prompt: Prompt
    rep_idx: int

    @property
    def row_id(self) -> str:
        return make_id(self.arm.name, self.prompt.id, self.rep_idx)

    @property
    def reference_id(self) -> str:
        """The id of the unsteered row of this prompt and repeat."""
        return make_id(UNSTEERED, self.prompt.id, self.rep_idx)


def build_tasks(arms: Sequence[Arm], prompts: Sequence[Prompt], n_reps: int) -> list[Task]:
    """Every arm with every prompt, `n_reps` times; arm by arm, then prompt by prompt."""
    return [Task(arm, prompt, rep) for arm in arms for prompt in prompts for rep in range(n_reps)]
