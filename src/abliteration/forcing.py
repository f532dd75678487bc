"""Given tokens under several trials' edits at once: what each edited model makes of the same answers."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from src.models.architectures import decoder_layers
from src.models.language_model import LanguageModel
from src.models.lower_layers import LowerStates, entered
from src.models.residual_writers import PlacedWriter
from src.models.shared_prefix import LEAST_TOKENS, SharedPrefix, can_share_prefix, common_prefix
from src.models.teacher_forcing import in_batches, logits_behind, response_logits
from src.models.token_sequences import TokenSequence
from src.models.weight_editor import Edits, editing
from src.ops.divergence import divergence

TOKENS_PER_BATCH = 2048
MAX_LOGITS = 1 << 26
"""Logits that are held at a time."""
N_KEPT = 10
"""Layers, about, whose inputs are kept."""
N_CHECKED = 2
"""Sequences on which it is seen whether layers can be left out."""
MOST_APART, MOST_APART_SHORT = 1e-4, 1e-2
"""Nats a token that leaving layers out may make: in float32, and in shorter formats, where batches alone make some."""
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
    model: LanguageModel,
    writers: Sequence[PlacedWriter],
    trials: Sequence[Edits],
    forced: Sequence[Forced],
    note: Note,
    *,
    lower: LowerStates | None = None,
    keep: LowerStates | None = None,
) -> None:
    """
    Run every sequence under every trial's edits; `note` gets the logits of the places that predict its answer. What all
    prompts begin with is run once a trial where the model allows it. lower: what enters the layers, kept by another
    call as `keep`; of it the highest layer that no edit is below is where the sequences begin.
    """
    n = len(forced)
    shared = shared_prefix(model, forced, lower)
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    layer = lower.layer_for(first_edited(writers, trials)) if lower else None

    def fits(batch: Sequence[int]) -> bool:
        return len(batch) * max(forced[i % n].n_places for i in batch) * vocabulary <= MAX_LOGITS

    with torch.inference_mode(), editing(model.model, writers, trials) as rows:
        rows.rows = list(range(len(trials)))
        prefix = SharedPrefix(model.model, shared, len(trials)) if shared else None

        def run(batch: Sequence[int]) -> None:
            rows.rows = [i // n for i in batch]
            some, n_kept = [forced[i % n].run for i in batch], max(forced[i % n].n_places for i in batch)
            names = [each.id for each in some]
            with ExitStack() as stack:
                if keep:
                    lengths_behind = [len(each.token_ids) - len(shared) for each in some]
                    stack.enter_context(keep.keeping(model.model, dict(zip(names, lengths_behind, strict=True))))
                if layer is not None:
                    hidden = lower.entering(layer, names, model.device)
                    stack.enter_context(entered(model.model, layer, hidden))
                if prefix:
                    logits = logits_behind(model, some, prefix, rows.rows, n_kept)
                else:
                    logits = response_logits(model, some, [None] * len(some), n_kept)
            for i, each in zip(batch, logits, strict=True):
                note(i // n, i % n, each[-forced[i % n].n_places :])

        lengths = [len(each.run.token_ids) - len(shared) for each in forced]
        in_batches(model, lengths * len(trials), run, TOKENS_PER_BATCH, fits)


def shared_prefix(model: LanguageModel, forced: Sequence[Forced], lower: LowerStates | None = None) -> tuple[int, ...]:
    """What is run once for all: what the prompts begin with, as long as in `lower` where there is one."""
    if lower:
        return forced[0].prompt[: lower.n_prefix]
    found = common_prefix([each.prompt for each in forced]) if len(forced) > 1 and can_share_prefix(model.model) else ()
    return found if len(found) >= LEAST_TOKENS else ()


def first_edited(writers: Sequence[PlacedWriter], trials: Sequence[Edits]) -> int:
    """The lowest layer that any of the trials edits; above all layers where none does."""
    names = {name for trial in trials for name in trial}
    return min((each.layer for each in writers if each.name in names), default=1 << 30)


def kept_layers(model: LanguageModel, forced: Sequence[Forced]) -> LowerStates:
    """For `keep` of `force`: nothing yet, of every few layers."""
    n_layers = len(decoder_layers(model.model))
    step = max(1, n_layers // N_KEPT)
    return LowerStates(layers=tuple(range(step, n_layers, step)), n_prefix=len(shared_prefix(model, forced)))


def checked_lower(
    model: LanguageModel, forced: Sequence[Forced], kept: LowerStates, plain: Sequence[Tensor]
) -> LowerStates | None:
    """
    What was kept, if a pass that leaves out all layers but the last few gives `plain`, the log-probabilities of the
    whole model; None for a model in which layers get more from those below than the hidden states.
    """
    if not kept.layers or not kept.can_enter:
        return None
    few = sorted(range(len(forced)), key=lambda i: len(forced[i].run.token_ids))[:N_CHECKED]
    apart: list[float] = []

    def note(trial: int, i: int, logits: Tensor) -> None:
        apart.append(divergence(plain[few[i]], logits).max().item())

    try:
        force(model, (), [{}], [forced[i] for i in few], note, lower=kept)
    except KeyError:
        # Layers that look up keys and values which lower ones have put into a mapping of all.
        return None
    most = MOST_APART if model.model.dtype == torch.float32 else MOST_APART_SHORT
    return kept if max(apart) <= most else None


def log_probability(forced: Forced, logits: Tensor) -> tuple[float, bool]:
    """ln P(answer) in nats, and whether every token of it is the likeliest."""
    tokens = torch.tensor(forced.answer, device=logits.device)
    chosen = logits.float().log_softmax(dim=-1).gather(1, tokens[:, None]).double().sum().item()
    return chosen, bool((logits.argmax(dim=-1) == tokens).all())
