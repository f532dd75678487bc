"""What is added to a layer's feed-forward output whatever the input: where it acts, and which weights can hold it."""

from typing import Any

import torch
from torch import Tensor, nn

from src.common.errors import InputError
from src.models.architectures import decoder_layers, mlp, mlp_writers
from src.models.expert_edits import is_fused
from src.models.residual_writers import STEER, PlacedWriter, residual_writers


def block_that_adds(model: nn.Module, placed: PlacedWriter) -> nn.Module | None:
    """
    The module whose output takes what is added at a writer; None for the writer's own. Of several experts each gets a
    share of the tokens, and its output a weight, so that there the whole block takes it, once.
    """
    layer = decoder_layers(model)[placed.layer]
    is_one = placed.component != "mlp" or (len(mlp_writers(layer)) == 1 and not is_fused(placed.writer))
    return None if is_one else mlp(layer)


def refuse_bias(model: nn.Module, placed: PlacedWriter) -> None:
    """Raises InputError where no bias of the architecture can hold what is added at a writer."""
    config = model.config.get_text_config(decoder=True)
    why = None
    if block_that_adds(model, placed) is not None:
        why = "its experts' outputs are weighted, and nothing behind them has a bias"
    elif not _has_bias(placed) and (placed.component != "mlp" or not hasattr(config, "mlp_bias")):
        why = f"{config.model_type} models have no bias there"
    if why:
        raise InputError(
            f"--induce with --save model: {placed.name} cannot hold what is added ({why}); {STEER}, take --save none, "
            f"or save an edit without --induce"
        )


@torch.no_grad()
def add_bias(model: nn.Module, placed: PlacedWriter, bias: Tensor) -> None:
    """Add to the bias of a writer, float32 (d_model,), which is made where there is none. Raises as `refuse_bias`."""
    refuse_bias(model, placed)
    if not _has_bias(placed):
        _make_biases(model)
    module: Any = placed.writer.module
    module.bias.add_(bias.to(module.bias))


def _has_bias(placed: PlacedWriter) -> bool:
    return getattr(placed.writer.module, "bias", None) is not None


def _make_biases(model: nn.Module) -> None:
    """Zeros in every layer's feed-forward parts: one setting stands for all."""
    model.config.get_text_config(decoder=True).mlp_bias = True
    layers = decoder_layers(model)
    for each in residual_writers(model, ("mlp",)):
        # What holds fused experts has a router, too, which the setting is not about.
        if is_fused(each.writer):
            continue
        for linear in layers[each.layer].get_submodule(each.writer.path.rpartition(".")[0]).children():
            if isinstance(linear, nn.Linear) and linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
