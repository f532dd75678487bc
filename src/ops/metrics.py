"""
Token uncertainty from logits: entropy of the full-vocabulary distribution, and the mass of the likeliest k tokens.

H = −Σ p·ln p (Shannon 1948), in nats; mass_k = Σ of the k largest p; p = softmax of the untempered logits in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_ELEMENTS_AT_ONCE = 1 << 24
"""Rows are taken in groups of at most this many logits, so that the float32 copies stay small beside the model."""
MAX_ELEMENTS_IN_CACHE = 1 << 20
"""The same on the CPU, where rows that stay in its cache are three times as fast."""
GROUP = 64
"""Logits per group when the likeliest tokens are looked for."""


class Uncertainty(NamedTuple):
    """All are float32, shape (rows,)."""

    entropy: Tensor
    """Nats, from 0 to ln(vocabulary)."""
    top_k_mass: Tensor
    """A probability, from k / vocabulary to 1."""
    log_normalizer: Tensor
    """ln Σ exp(logit): a token's log-probability is its logit less this."""


def token_uncertainty(logits: Tensor, k: int = 5) -> Uncertainty:
    """
    Entropy and top-k mass of each row of `logits` (rows, vocabulary), any float dtype.

    −inf logits count as probability 0. A row that holds NaN or +inf, or only −inf, gives NaN in all: what a broken
    distribution means is the caller's to decide, it is never hidden here. Raises ValueError for a k outside
    1…vocabulary.
    """
    assert logits.dim() == 2, f"logits must be (rows, vocabulary), got {tuple(logits.shape)}"
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top-k mass with k = {k}: k must lie between 1 and the vocabulary's size, {logits.shape[1]}")
    at_once = min(MAX_ELEMENTS_AT_ONCE, MAX_ELEMENTS_IN_CACHE if logits.device.type == "cpu" else MAX_ELEMENTS_AT_ONCE)
    rows_at_once = max(1, at_once // logits.shape[1])
    parts = [_uncertainty(rows, k) for rows in logits.split(rows_at_once)]
    return Uncertainty(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _uncertainty(logits: Tensor, k: int) -> Uncertainty:
    logits = logits.float()
    largest = _largest(logits, k)
    peak = largest[:, :1]
    # With s = logit − peak, Z = Σ exp(s): H = ln Z − Σ exp(s)·s / Z. The clamp turns 0·(−inf), a NaN, into 0.
    shifted = (logits - peak).clamp_min_(-1e30)
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    log_total = total.log()
    entropy = log_total - weights.mul_(shifted).sum(dim=-1) / total
    mass = (largest - peak).exp().sum(dim=-1) / total
    # Sums of rounded terms can leave the possible range by an ulp.
    return Uncertainty(entropy.clamp_min(0.0), mass.clamp_max(1.0), peak[:, 0] + log_total)


def _largest(logits: Tensor, k: int) -> Tensor:
    """The k largest of each row, in descending order: found among the k groups with the largest maxima."""
    rows, size = logits.shape
    n_groups = size // GROUP
    if k >= n_groups:
        return logits.topk(k, dim=-1).values
    groups = logits[:, : n_groups * GROUP].view(rows, n_groups, GROUP)
    best = groups.amax(dim=-1).topk(k, dim=-1).indices
    candidates = groups.gather(1, best[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    return torch.cat([candidates, logits[:, n_groups * GROUP :]], dim=1).topk(k, dim=-1).values
