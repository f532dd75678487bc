"""Given tokens under several trials' edits at once: what each edited model makes of the same answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from src.models.language_model import LanguageModel
from src.models.shared_prefix import LEAST_TOKENS, SharedPrefix, can_share_prefix, common_prefix
from src.models.teacher_forcing import in_batches, logits_behind, response_logits
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
    """
    Run every sequence under every trial's edits; `note` gets the logits of the places that predict its answer. What all
    prompts begin with is run once a trial where the model allows it.
    """
    n = len(forced)
    shared = common_prefix([each.prompt for each in forced]) if n > 1 and can_share_prefix(model.model) else ()
    n_shared = len(shared) if len(shared) >= LEAST_TOKENS else 0
    vocabulary = model.model.get_output_embeddings().weight.shape[0]

    def fits(batch: Sequence[int]) -> bool:
        return len(batch) * max(forced[i % n].n_places for i in batch) * vocabulary <= MAX_LOGITS

    with torch.inference_mode(), editing(model.model, writers, trials) as rows:
        rows.rows = list(range(len(trials)))
        prefix = SharedPrefix(model.model, shared, len(trials)) if n_shared else None

        def run(batch: Sequence[int]) -> None:
            rows.rows = [i // n for i in batch]
            some, n_kept = [forced[i % n].run for i in batch], max(forced[i % n].n_places for i in batch)
            if prefix:
                logits = logits_behind(model, some, prefix, rows.rows, n_kept)
            else:
                logits = response_logits(model, some, [None] * len(some), n_kept)
            for i, each in zip(batch, logits, strict=True):
                note(i // n, i % n, each[-forced[i % n].n_places :])

        lengths = [len(each.run.token_ids) - n_shared for each in forced]
        in_batches(model, lengths * len(trials), run, TOKENS_PER_BATCH, fits)


def log_probability(forced: Forced, logits: Tensor) -> tuple[float, bool]:
    """ln P(answer) in nats, and whether every token of it is the likeliest."""
    tokens = torch.tensor(forced.answer, device=logits.device)
    chosen = logits.float().log_softmax(dim=-1).gather(1, tokens[:, None]).double().sum().item()
    return chosen, bool((logits.argmax(dim=-1) == tokens).all())
