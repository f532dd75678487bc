"""The worker's side of divergences: from the hidden states that two passes kept to the KL of their distributions."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from src.models.log_probabilities import chosen
from src.models.vllm_capture import CaptureStore
from src.ops.divergence import divergence, rows_at_once

Pair = tuple[str, str, int]
"""vLLM's names of the unsteered and the steered request, and how many positions both kept."""

Asked = tuple[str, Sequence[Sequence[int]]]
"""vLLM's name of a request, and answers of equal length: the states that it kept predict their tokens."""


@torch.inference_mode()
def log_probabilities(
    runner: Any, kept: CaptureStore, asked: Sequence[Asked], adapter: Any = None
) -> list[list[list[float]]] | None:
    """
    Of each answer of each request the log-probability of every token, in nats. To be called on all ranks; adapter and
    None as for `divergences`.
    """
    return _from_first_rank([_chosen(runner, kept, each, adapter) for each in asked])


def _chosen(runner: Any, kept: CaptureStore, asked: Asked, adapter: Any) -> list[list[float]] | None:
    name, answers = asked
    states = kept.look(name, len(answers[0]), mean=False)
    if not states:
        return None
    (states,) = states.values()
    parts = [_logits(runner, some, adapter) for some in states.split(_rows_at_once(runner, len(states)))]
    return [
        torch.cat([chosen(logits, tokens) for logits, tokens in zip(parts, _cut(answer, parts), strict=True)]).tolist()
        for answer in answers
    ]


def _cut(answer: Sequence[int], parts: Sequence[Tensor]) -> Iterator[Sequence[int]]:
    """The answer's tokens in pieces as long as the parts."""
    start = 0
    for part in parts:
        yield answer[start : start + len(part)]
        start += len(part)


@torch.inference_mode()
def divergences(
    runner: Any, kept: CaptureStore, pairs: Sequence[Pair], adapter: Any = None
) -> list[list[float]] | None:
    """
    Of each pair KL(P ‖ Q) at every kept position, in nats, P being what the first request's states give and Q the
    second's. What is not a number comes out as it is. To be called on all ranks: those of a tensor-parallel group make
    the logits together. adapter: vLLM's request of the adapter that all of them had. None on ranks that keep no outputs
    of the model, and on all but the first of a group.
    """
    return _from_first_rank([_divergence(runner, kept, pair, adapter) for pair in pairs])


def _from_first_rank(found: list) -> list | None:
    from vllm.distributed.parallel_state import get_tp_group

    if any(values is None for values in found):
        assert all(values is None for values in found), "outputs of some requests are kept and of others not"
        return None
    return found if get_tp_group().rank_in_group == 0 else None


def _divergence(runner: Any, kept: CaptureStore, pair: Pair, adapter: Any) -> list[float] | None:
    *names, n_positions = pair
    states = [kept.look(name, n_positions, mean=False) for name in names]
    if not any(states):
        return None
    (p,), (q,) = (each.values() for each in states)
    at_once = _rows_at_once(runner, len(p))
    parts = [
        divergence(_logits(runner, p_some, adapter), _logits(runner, q_some, adapter))
        for p_some, q_some in zip(p.split(at_once), q.split(at_once), strict=True)
    ]
    return torch.cat(parts).tolist()


def _rows_at_once(runner: Any, n: int) -> int:
    # With adapters vLLM has room for as many rows of logits as it has requests.
    return min(rows_at_once(runner.model_config.get_vocab_size()), runner.max_num_reqs if runner.lora_config else n)


def _logits(runner: Any, states: Tensor, adapter: Any) -> Tensor:
    """The model's logits of hidden states (tokens, d_model): (tokens, vocabulary)."""
    if runner.lora_config:
        # What an adapter does to the unembedding is told row by row, 0 for none; told last were those of the last step.
        rows = (adapter.lora_int_id if adapter else 0,) * len(states)
        runner._set_active_loras(rows, rows, {adapter} if adapter else set())
    logits = runner.get_model().compute_logits(states)
    assert logits is not None and len(logits) == len(states), "this platform gathers logits on one rank alone"
    return logits
