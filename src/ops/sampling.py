"""Choosing the next token: the likeliest, or a draw from the tempered distribution by inverting its cumulative sum."""

import torch
from torch import Tensor

MAX_ELEMENTS_AT_ONCE = 1 << 24


def next_tokens(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> Tensor:
    """
    One token a row: int64 (rows,).

    logits: (rows, vocabulary). temperatures: float32 (rows,); 0 takes the likeliest token, the lowest id among equals.
    uniforms: float64 (rows,) in [0, 1), one draw a row from that row's own generator, so that a row's token depends on
    its own logits and seed alone. A row at temperature t > 0 gets the first token whose cumulative probability under
    softmax(logits / t) exceeds its draw (inverse transform sampling, Devroye 1986, §III.2); a token of probability 0
    is never drawn.
    """
    assert logits.dim() == 2 and temperatures.shape == uniforms.shape == logits.shape[:1]
    tokens = logits.argmax(dim=-1)
    sampled = (temperatures > 0).nonzero().squeeze(-1)
    if not len(sampled):
        return tokens
    rows_at_once = max(1, MAX_ELEMENTS_AT_ONCE // logits.shape[1])
    for rows in sampled.split(rows_at_once):
        tokens[rows] = _draw(logits[rows], temperatures[rows], uniforms[rows])
    return tokens


def _draw(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> Tensor:
    # MPS has no float64; there the sum of 10⁵ float32 terms is good to about 1e-5 of probability.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    # Shifting by the maximum before the division keeps a tiny temperature from overflowing to inf − inf.
    shifted = logits.to(wide) - logits.to(wide).amax(dim=-1, keepdim=True)
    cumulative = (shifted / temperatures.to(wide)[:, None]).softmax(dim=-1).cumsum(dim=-1)
    # Scaling by the last entry, which rounding leaves beside 1, keeps every draw below the total.
    targets = uniforms.to(wide)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    return tokens.clamp_max(logits.shape[1] - 1)
