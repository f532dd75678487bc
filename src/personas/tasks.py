"""The tasks of a persona run: personas × prompts × repeats, each a conversation of one or more turns."""

from collections.abc import Sequence
from dataclasses import dataclass

from src.common.results import make_id
from src.common.rows import Persona, Prompt


@dataclass(frozen=True)
class Task:
    """One conversation."""

    persona: Persona
    prompt: Prompt
    rep_idx: int

    def row_id(self, turn: int) -> str:
        """16 hex digits that name the row of one turn, the same in every run and on every machine."""
        return make_id(self.persona.persona, self.persona.category, self.prompt.id, self.rep_idx, turn)


def build_tasks(personas: Sequence[Persona], prompts: Sequence[Prompt], n_reps: int) -> list[Task]:
    """Every persona with every prompt, `n_reps` times; persona by persona, then prompt by prompt."""
    return [Task(persona, prompt, rep) for persona in personas for prompt in prompts for rep in range(n_reps)]
