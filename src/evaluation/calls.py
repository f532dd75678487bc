"""What an evaluation asks of a model: calls, and the answers, each on disk as soon as it is there."""

from dataclasses import dataclass
from pathlib import Path

from src.common.results import Results, Row, make_id
from src.models.response_fields import MEASURED_FIELDS

FILE_NAME = "answers.jsonl"
GENERATED, FORCED = "generated", "forced"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A prompt to continue, or given answers to weigh. Calls with equal ids have equal answers."""

    reference: str
    """The model reference."""
    arm: str
    """The name of the arm: what acts on the hidden states."""
    token_ids: tuple[int, ...]
    header: str
    """The prompt's last piece, which may open the answer's thinking."""
    max_tokens: int = 1
    temperature: float = 0.0
    seed: int = 0
    options: tuple[tuple[int, ...], ...] = ()
    """Token ids of given answers, of which the log-probabilities are asked; () to generate."""

    @property
    def id(self) -> str:
        """The same in every start of a run."""
        kind = FORCED if self.options else GENERATED
        how = (self.max_tokens, str(self.temperature), self.seed if self.temperature else 0)
        return make_id(kind, self.reference, self.arm, str(self.token_ids), *how, str(self.options))


class Answers(Results):
    """
    The answers to calls, by call id: of generated ones `token_ids` and the fields of a response, of given ones
    `log_probabilities`, the sum over each answer's tokens in nats, unrounded: near ties decide.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, MEASURED_FIELDS, FILE_NAME)

    def keep(self, row: Row) -> Row:
        """Write an answer; returns it as it was written, so that a resumed run goes on with the same numbers."""
        self.add(row)
        return self.rows[str(row["id"])]
