"""Greedy answers of several trials in one batch, which can be halted, looked at and gone on with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from src.models.generation import Batch, Row, needs_equal_lengths
from src.models.language_model import LanguageModel
from src.models.types import GenerationRequest
from src.models.weight_editor import RowsOfTrials

STEPS_BETWEEN_LOOKS = 4
"""Tokens between two looks at whether an answer shows the behaviour."""
AFTER_TRIAL = ":"


def trial_of(request_id: str) -> int:
    """Of which trial a request of `Answers` is."""
    return int(request_id.partition(AFTER_TRIAL)[0])


class Detector(Protocol):
    """What decides whether a text shows the behaviour."""

    grows: bool
    """Whether a text that shows it shows it however it goes on: what markers do and a classifier does not."""

    def shown(self, texts: Sequence[str]) -> list[bool]: ...


@dataclass(frozen=True)
class Asked:
    """A prompt as the model gets it."""

    id: str
    text: str
    token_ids: tuple[int, ...]


def shows_already(model: LanguageModel, detector: Detector, tokens: Sequence[int]) -> bool:
    """Whether an answer that begins so shows the behaviour however it goes on; its last word may yet grow."""
    settled = model.decode(tokens).rpartition(" ")[0] if detector.grows else ""
    return bool(settled) and detector.shown([settled])[0]


def batches_of(
    model: LanguageModel, rows: Sequence[tuple[int, str]], prompts: Mapping[str, Asked], batch_size: int
) -> list[list[tuple[int, str]]]:
    """(trial, prompt id) in lists of at most `batch_size`, long prompts with long ones."""
    equal = needs_equal_lengths(model.model)
    length = lambda row: len(prompts[row[1]].token_ids)  # noqa: E731
    found: list[list[tuple[int, str]]] = []
    for row in sorted(rows, key=lambda row: -length(row)):
        is_full = not found or len(found[-1]) == batch_size or (equal and length(row) != length(found[-1][0]))
        if is_full:
            found.append([])
        found[-1].append(row)
    return found


class Answers:
    """One batch of rows, each a (trial, prompt id)."""

    def __init__(
        self, model: LanguageModel, detector: Detector, rows: Sequence[tuple[int, str]], prompts: Mapping[str, Asked],
        *, n_tokens: int, of_trials: RowsOfTrials, numbers: Mapping[int, int], on_answer: Callable[..., None],
    ) -> None:  # fmt: skip
        """
        n_tokens: of each answer at most. numbers: trial → its number in `of_trials`. on_answer(trial, prompt id, shown,
        text): once a row, as soon as the verdict is known; text is None for an answer that was not written to its end.
        """
        self._model, self._detector = model, detector
        self._of_trials, self._numbers, self._on_answer = of_trials, numbers, on_answer
        self._n_steps = 0
        self._rows = {f"{trial}{AFTER_TRIAL}{name}": (trial, name) for trial, name in rows}
        requests = [
            GenerationRequest(id=key, token_ids=prompts[name].token_ids, max_tokens=n_tokens)
            for key, (_, name) in self._rows.items()
        ]
        pad_id = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else 0
        self._batch = Batch(model.model, requests, pad_id, 1)

    def run(self, n_tokens: int, stopped: set[int]) -> None:
        """Go on to `n_tokens` tokens, without the rows of `stopped` trials."""
        self._leave([row for row in self._batch.rows if self._trial(row) in stopped])
        ended: list[Row] = []
        while self._batch.rows and self._n_steps < n_tokens:
            self._of_trials.rows = [self._numbers[self._trial(row)] for row in self._batch.rows]
            ended += [row for row, _ in self._batch.step(self._model.eos_ids)]
            self._n_steps += 1
            if self._n_steps % STEPS_BETWEEN_LOOKS == 0:
                shown = [row for row in self._batch.rows if shows_already(self._model, self._detector, row.tokens)]
                for row in shown:
                    self._on_answer(*self._rows[row.request.id], True, None)
                self._leave(shown)
        # All in one call: a classifier takes them in batches, and a judge side by side.
        texts = [self._model.decode(row.tokens) for row in ended]
        for row, text, shown in zip(ended, texts, self._detector.shown(texts) if texts else [], strict=True):
            self._on_answer(*self._rows[row.request.id], shown, text)

    def _leave(self, rows: Sequence[Row]) -> None:
        gone = {id(row) for row in rows}
        if gone:
            self._batch.keep([i for i, row in enumerate(self._batch.rows) if id(row) not in gone])

    def _trial(self, row: Row) -> int:
        return self._rows[row.request.id][0]
