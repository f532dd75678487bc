"""Given tokens under several trials' edits at once: what each edited model makes of the same answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from src.models.language_model import LanguageModel
from src.models.teacher_forcing import in_batches, response_logits
from src.models.token_sequences import TokenSequence
from src.models.weight_editor import Edits, PlacedWriter, editing

TOKENS_PER_BATCH = 2048
MAX_LOGITS = 1 << 26
"""Logits that are held at a time."""
Note = Callable[[int, int, Tensor], None]
"""Gets the numbers of a trial and a sequence, and logits (places, vocabulary)."""


@dataclass(frozen=True)
class Forced:
    """A prompt with an answer that is given."""

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def n_places(self) -> int:
        """Places that predict the answer's tokens, or its first where it has none."""
        return max(1, len(self.answer))

    @cached_property
    def run(self) -> TokenSequence:
        """What goes through the model: the last token only predicts what comes after it."""
        return TokenSequence(id=self.id, token_ids=self.prompt + self.answer[:-1], prompt_length=len(self.prompt))


def force(
    model: LanguageModel, writers: Sequence[PlacedWriter], trials: Sequence[Edits], forced: Sequence[Forced], note: Note
) -> None:
    """Run every sequence under every trial's edits; `note` gets the logits of the places that predict its answer."""
    n = len(forced)
    vocabulary = model.model.get_output_embeddings().weight.shape[0]

    def fits(batch: Sequence[int]) -> bool:
        return len(batch) * max(forced[i % n].n_places for i in batch) * vocabulary <= MAX_LOGITS

    with torch.inference_mode(), editing(model.model, writers, trials) as rows:

        def run(batch: Sequence[int]) -> None:
            rows.rows = [i // n for i in batch]
            some = [forced[i % n].run for i in batch]
            logits = response_logits(model, some, [None] * len(some), max(forced[i % n].n_places for i in batch))
            for i, each in zip(batch, logits, strict=True):
                note(i // n, i % n, each[-forced[i % n].n_places :])

        in_batches(model, [len(each.run.token_ids) for each in forced] * len(trials), run, TOKENS_PER_BATCH, fits)


def log_probability(forced: Forced, logits: Tensor) -> tuple[float, bool]:
    """ln P(answer) in nats, and whether every token of it is the likeliest."""
    tokens = torch.tensor(forced.answer, device=logits.device)
    chosen = logits.float().log_softmax(dim=-1).gather(1, tokens[:, None]).double().sum().item()
    return chosen, bool((logits.argmax(dim=-1) == tokens).all())
