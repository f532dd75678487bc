"""
Log-probabilities of given answers, steered or not: how likely a model finds the options of a question.

As in `teacher_forcing` every token is run at once, each row under its own spec.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from src.common.errors import InputError
from src.models.cpu_linear import packed_linears
from src.models.teacher_forcing import (
    MAX_LOGITS,
    TOKENS_PER_BATCH,
    ForcedRow,
    in_batches,
    n_response,
    not_finite,
    response_logits,
)
from src.models.token_sequences import TokenSequence

if TYPE_CHECKING:
    from src.models.language_model import LanguageModel


def log_probabilities(
    model: "LanguageModel", rows: Sequence[ForcedRow], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[Tensor]:
    """
    For each row, ln P(token | tokens before it) of each token of its response under the row's spec, in nats: float64
    (response tokens,), on the CPU. Log-probabilities in float32 of untempered logits. Rows that differ in their last
    token alone share a pass, as the options of a question do. Raises as `teacher_forcing.kl_per_token`.
    """
    found: list[Tensor | None] = [None] * len(rows)
    members = runs_of(rows)
    vocabulary = model.model.get_output_embeddings().weight.shape[0]

    def fits(batch: Sequence[int]) -> bool:
        return len(batch) * max(n_response(rows[members[g][0]][0]) for g in batch) * vocabulary <= MAX_LOGITS

    def run(batch: Sequence[int]) -> None:
        firsts = [rows[members[g][0]] for g in batch]
        kept = max(n_response(sequence) for sequence, _ in firsts)
        logits = response_logits(model, [before_last(s) for s, _ in firsts], [spec for _, spec in firsts], kept)
        for g, each in zip(batch, logits, strict=True):
            for i in members[g]:
                tokens = response_tokens(rows[i][0])
                found[i] = checked_log_probabilities(chosen(each[-len(tokens) :], tokens), rows[i][0].id)

    with torch.inference_mode(), packed_linears(model.model):
        in_batches(model, [len(rows[group[0]][0].token_ids) for group in members], run, tokens_per_batch, fits)
    return found


def runs_of(rows: Sequence[ForcedRow]) -> list[list[int]]:
    """The rows by what has to be run for them: numbers of those that differ in their last token alone."""
    groups: dict[tuple, list[int]] = {}
    for i, (sequence, spec) in enumerate(rows):
        n_response(sequence)
        acting = spec.fingerprint if spec and spec.operations else None
        groups.setdefault((sequence.token_ids[:-1], sequence.prompt_length, acting), []).append(i)
    return list(groups.values())


def before_last(sequence: TokenSequence) -> TokenSequence:
    """What has to be run: the last token only predicts what comes after it."""
    return TokenSequence(id=sequence.id, token_ids=sequence.token_ids[:-1], prompt_length=sequence.prompt_length)


def response_tokens(sequence: TokenSequence) -> tuple[int, ...]:
    return sequence.token_ids[sequence.prompt_length :]


def chosen(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Of logits (n, vocabulary) the log-probability of each place's token: float64 (n,), on the CPU."""
    index = torch.tensor(tokens, device=logits.device)
    return logits.float().log_softmax(dim=-1).gather(1, index[:, None])[:, 0].double().cpu()


def checked_log_probabilities(values: Tensor, name: str) -> Tensor:
    """The values as they came out. Raises InputError where one is not finite."""
    if not values.isfinite().all():
        raise InputError(not_finite(name, "log-probabilities"))
    return values
