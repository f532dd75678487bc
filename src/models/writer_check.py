"""Whether edits of the known writers are all that a model needs: seen in a forward call of a few tokens."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from src.common.errors import InputError
from src.models.architectures import decoder_layers
from src.models.expert_edits import is_fused
from src.models.hooks import Location, reading, replacing
from src.models.post_norms import run_short
from src.models.residual_writers import STEER, PlacedWriter, matrix
from src.models.weight_editor import Edits, editing
from src.ops.weight_edits import WeightEdit

MOST_LEFT = 0.01
"""Of what a random direction has of a layer's addition, that may be left in it; an unknown part leaves more."""
ROUNDINGS = 1.5
"""Of a number's last place, that sums of hidden states may be off by."""
TIMES_THE_STREAM = 10.0
"""Length of what is added to see whether it arrives, so that rounding of the stream hides nothing."""


def refuse_partial(model: nn.Module, writers: Sequence[PlacedWriter], gains: Mapping[str, Tensor]) -> None:
    """
    Raises InputError, naming the layer, where an edit of all writers that takes a direction out of what they write
    leaves it in what the layer adds to the residual stream. gains: of `gains_behind`.

    The writers' own biases, which no edit changes, are left out of this.
    """
    n_layers, width = len(decoder_layers(model)), model.config.get_text_config(decoder=True).hidden_size
    v = normalize(torch.randn(width, generator=torch.Generator().manual_seed(0)), dim=0)
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}

    def without(layer: int, hidden: Tensor) -> Tensor:
        # So that a layer that scales the whole stream (Gemma 4) is no reason to refuse it.
        on = v.to(hidden.device)
        before[layer] = (hidden.float() - (hidden.float() @ on)[..., None] * on).to(hidden.dtype)
        return before[layer]

    edits = {each.name: _removing(each, v if each.name not in gains else v * gains[each.name]) for each in writers}
    with _without_biases(writers), editing(model, writers, [edits]), _following(model, range(n_layers), without, after):
        run_short(model)
    for layer in range(n_layers):
        left = _left(before[layer].float().cpu(), after[layer].float().cpu(), v, model.dtype)
        if left > 1:
            names = [each.name for each in writers if each.layer == layer]
            raise InputError(
                f"layer {layer}: with {', '.join(names) or 'nothing'} edited, a direction is still in what the layer "
                f"adds to the residual stream: a part of {type(model).__name__} that is not known writes there, too, "
                f"or changes what is written. An edit would be partial; {STEER}"
            )


def refuse_changed_additions(model: nn.Module, writers: Sequence[PlacedWriter], edits: Edits) -> None:
    """
    Raises InputError, naming the layer, where the biases of `edits`, which do nothing else, do not reach the residual
    stream as they are: a norm or a factor is behind the writer.
    """
    layers = sorted({each.layer for each in writers if each.name in edits})
    plain_in: dict[int, Tensor] = {}
    plain_out: dict[int, Tensor] = {}
    changed: dict[int, Tensor] = {}
    with _following(model, layers, lambda layer, hidden: plain_in.__setitem__(layer, hidden.clone()), plain_out):
        run_short(model)
    sizes = {layer: TIMES_THE_STREAM * plain_out[layer].float().norm(dim=-1).median().item() for layer in layers}
    at = {each.name: each.layer for each in writers}
    long = {
        name: replace(edit, bias=sizes[at[name]] * normalize(edit.bias.float(), dim=0)) for name, edit in edits.items()
    }
    with editing(model, writers, [long]), _following(model, layers, lambda layer, _: plain_in[layer], changed):
        run_short(model)
    for name, edit in long.items():
        arrived = (changed[at[name]].float() - plain_out[at[name]].float()).cpu()
        off = (arrived - edit.bias.cpu()).norm(dim=-1).median()
        if not off <= (MOST_LEFT + torch.finfo(model.dtype).eps) * sizes[at[name]]:
            raise InputError(
                f"--induce: what {name} adds does not reach the residual stream of layer {at[name]} as it is: a norm "
                f"or a factor is between them; {STEER}"
            )


@contextmanager
def _following(model: nn.Module, layers: Sequence[int], change: object, after: dict[int, Tensor]) -> Iterator[None]:
    """Within the context `change(layer, hidden)` is what enters a layer, and `after` gets what leaves it."""
    changes = {Location(layer, "resid_pre"): partial(change, layer) for layer in layers}
    ends = {
        Location(layer, "resid_post"): lambda hidden, layer=layer: after.__setitem__(layer, hidden.clone())
        for layer in layers
    }
    with replacing(model, changes), reading(model, ends):
        yield


def _removing(placed: PlacedWriter, vector: Tensor) -> WeightEdit:
    weight = matrix(placed.writer)
    v = normalize(vector, dim=0).to(weight.device)
    return WeightEdit(u=v[:, None], a=(v @ weight)[..., None, :])


def _left(before: Tensor, after: Tensor, v: Tensor, dtype: torch.dtype) -> float:
    """What is left of v in a layer's addition, of what may be; the median of the tokens."""
    added = after - before
    rounded = sum((v * each).norm(dim=-1) for each in (before, after, added))
    bar = MOST_LEFT * added.norm(dim=-1) / len(v) ** 0.5 + ROUNDINGS * torch.finfo(dtype).eps * rounded
    return ((after @ v).abs() / bar.clamp_min(torch.finfo(torch.float32).tiny)).median().item()


@contextmanager
def _without_biases(writers: Sequence[PlacedWriter]) -> Iterator[None]:
    """Within the context the writers have biases of 0."""
    names = {
        id(w.module): (w.module, f"{w.parameter}_bias" if is_fused(w) else "bias") for w in (p.writer for p in writers)
    }
    biases = [each for module, name in names.values() if isinstance(each := getattr(module, name, None), nn.Parameter)]
    kept = [each.data for each in biases]
    try:
        for each in biases:
            each.data = torch.zeros_like(each)
        yield
    finally:
        for each, data in zip(biases, kept, strict=True):
            each.data = data
