"""
Token uncertainty from logits: entropy of the full-vocabulary distribution, and the mass of the likeliest k tokens.

H = −Σ p·ln p (Shannon 1948), in nats; mass_k = Σ of the k largest p; p = softmax of the untempered logits in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_ELEMENTS_AT_ONCE = 1 << 24
"""Rows are taken in groups of at most this many logits, so that the float32 copies stay small beside the model."""


class Uncertainty(NamedTuple):
    """Both are float32, shape (rows,)."""

    entropy: Tensor
    """Nats, from 0 to ln(vocabulary)."""
    top_k_mass: Tensor
    """A probability, from k / vocabulary to 1."""


def token_uncertainty(logits: Tensor, k: int = 5) -> Uncertainty:
    """
    Entropy and top-k mass of each row of `logits` (rows, vocabulary), any float dtype.

    −inf logits count as probability 0. A row that holds NaN or +inf, or only −inf, gives NaN in both: what a broken
    distribution means is the caller's to decide, it is never hidden here. Raises ValueError for a k outside
    1…vocabulary.
    """
    assert logits.dim() == 2, f"logits must be (rows, vocabulary), got {tuple(logits.shape)}"
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top-k mass with k = {k}: k must lie between 1 and the vocabulary's size, {logits.shape[1]}")
    rows_at_once = max(1, MAX_ELEMENTS_AT_ONCE // logits.shape[1])
    parts = [_uncertainty(rows, k) for rows in logits.split(rows_at_once)]
    return Uncertainty(torch.cat([p.entropy for p in parts]), torch.cat([p.top_k_mass for p in parts]))


def _uncertainty(logits: Tensor, k: int) -> Uncertainty:
    log_p = logits.float().log_softmax(dim=-1)
    p = log_p.exp()
    # 0·(−inf) is NaN; xlogy would take a second logarithm. A true NaN stays, since only −inf is replaced.
    entropy = -(p * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=-1)
    # Sums of rounded terms can leave the possible range by an ulp.
    return Uncertainty(entropy.clamp_min(0.0), p.topk(k, dim=-1).values.sum(dim=-1).clamp_max(1.0))
