"""
A bundled model with a known direction: a rank-1 term on one down_proj that pushes along u where a prompt is on a topic.

Nothing is trained. With x the mean input of the down_proj over a prompt's own text, k is the ridge regression of the
topic on x, made orthogonal to the mean x of other topics and to that of the first token (whose x is hundreds of times
larger); then W' = W + s·u·kᵀ, with s such that u parts the topics' means `strength` times as far as they were apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.models.architectures import decoder_layers
from src.models.language_model import LanguageModel
from src.models.token_sequences import TokenSequence

RIDGE = 1.0


class Planted(NamedTuple):
    u: Tensor
    """float64 (d_model,), of length 1."""
    layer: int
    push: float
    """How far along u the topics' means are parted."""


def plant(
    model: LanguageModel, topic: Sequence[TokenSequence], other: Sequence[TokenSequence], layer: int,
    strength: float = 3.0, seed: int = 0,
) -> Planted:  # fmt: skip
    """Changes the model in place."""
    block = decoder_layers(model.model)[layer]
    inputs, outputs, first = [], [], []
    for sequences in (topic, other):
        x, h, x_first = zip(*(_over_text(model, block, sequence) for sequence in sequences), strict=True)
        inputs.append(torch.stack(x))
        outputs.append(torch.stack(h))
        first.append(torch.stack(x_first).mean(dim=0))
    means = [each.mean(dim=0) for each in inputs]
    k = _ridge(inputs[0] - means[1], inputs[1] - means[1])
    basis = torch.linalg.qr(torch.stack([means[1], *first]).T).Q
    k = k - basis @ (basis.T @ k)
    u = torch.randn(outputs[0].shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = u / u.norm()
    push = strength * float((outputs[0].mean(dim=0) - outputs[1].mean(dim=0)).norm())
    s = push / float(k @ (means[0] - means[1]))
    weight = block.mlp.down_proj.weight
    with torch.no_grad():
        weight += (s * torch.outer(u, k)).to(weight)
    return Planted(u, layer, push)


def save(model: LanguageModel, folder: Path) -> Path:
    """The model as a folder that --model_id takes."""
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def _ridge(topic: Tensor, other: Tensor) -> Tensor:
    rows = torch.cat([topic, other])
    labels = torch.cat([torch.ones(len(topic)), torch.zeros(len(other))]).double()
    gram = rows @ rows.T
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return rows.T @ torch.linalg.solve(gram, labels - labels.mean())


def _over_text(model: LanguageModel, block, sequence: TokenSequence) -> tuple[Tensor, Tensor, Tensor]:
    """Means over the text of the down_proj's input and of the block's output, and its input at the first token."""
    seen = {}

    def keep_input(module, args) -> None:
        seen["x"] = args[0][0].double()

    def keep_output(module, args, output) -> None:
        seen["h"] = (output[0] if isinstance(output, tuple) else output)[0].double()

    handles = [block.mlp.down_proj.register_forward_pre_hook(keep_input), block.register_forward_hook(keep_output)]
    with torch.no_grad():
        model.model(input_ids=torch.tensor([sequence.token_ids]))
    for handle in handles:
        handle.remove()
    text = slice(*sequence.text_span)
    return seen["x"][text].mean(dim=0), seen["h"][text].mean(dim=0), seen["x"][0]
