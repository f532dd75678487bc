"""How far one next-token distribution is from another."""

import torch
from torch import Tensor

MAX_LOGITS_AT_ONCE = 1 << 22
"""Logits in float32 and their products in float64, held while two passes are compared."""


def rows_at_once(vocabulary: int) -> int:
    """Rows of logits that are compared at a time."""
    return max(1, MAX_LOGITS_AT_ONCE // vocabulary)


def divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """
    KL(P ‖ Q) = Σ_x P(x)·(ln P(x) − ln Q(x)) of each row of two (rows, vocabulary), in nats: float64 (rows,) ≥ 0, on the
    CPU. Log-probabilities in float32, summed in float64. NaN or infinite where the logits are no distributions.
    """
    assert p_logits.shape == q_logits.shape, f"{tuple(p_logits.shape)} and {tuple(q_logits.shape)}"
    if not len(p_logits):
        return torch.zeros(0, dtype=torch.float64)
    at_once = rows_at_once(p_logits.shape[1])
    parts = []
    for p_some, q_some in zip(p_logits.split(at_once), q_logits.split(at_once), strict=True):
        p, q = (x.float().log_softmax(dim=-1) for x in (p_some, q_some))
        # Of a token that P never gives nothing counts, whatever Q gives it.
        terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
        parts.append(terms.cpu().double().sum(dim=-1).clamp_min(0.0))
    return torch.cat(parts)
