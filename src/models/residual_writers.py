"""The weights that write to the residual stream: all of a model's, and each as the matrix that it is."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from src.common.errors import InputError
from src.models.architectures import Writer, attention_writers, decoder_layers, mlp_writers
from src.models.expert_edits import is_fused

COMPONENTS = ("attn", "mlp")
STEER = "steer with the directions file instead (--steer)"
"""What can be done where weights cannot be edited."""


@dataclass(frozen=True, kw_only=True)
class PlacedWriter:
    """A weight that writes to the residual stream, and where it is."""

    layer: int
    component: str
    """attn or mlp."""
    writer: Writer

    @property
    def name(self) -> str:
        """The same in every copy of the model."""
        part = "" if self.writer.parameter == "weight" else f".{self.writer.parameter}"
        return f"{self.layer}.{self.writer.path}{part}"


def residual_writers(model: nn.Module, components: Sequence[str] = COMPONENTS) -> list[PlacedWriter]:
    """
    Every weight of the components (attn, mlp) that writes to the residual stream, layer by layer. Raises InputError
    where a part has none that is known or one in a layout that is not, for a weight that two layers share (an edit of
    one would be one of both), and for an adapter on fused experts, whose part of their weights is out of reach.
    """
    if any(type(module).__name__ == "ParamWrapper" for module in model.modules()):
        raise InputError(
            "the adapter acts on fused experts, where it cannot be edited along; merge it into the model first"
        )
    of = {"attn": attention_writers, "mlp": mlp_writers}
    found = []
    for i, layer in enumerate(decoder_layers(model)):
        for name in components:
            found += [PlacedWriter(layer=i, component=name, writer=each) for each in _known(of[name], layer, i)]
    if not found:
        raise InputError(f"no layer of {type(model).__name__} has a writer of {', '.join(components)}")
    _refuse_shared(found)
    width = model.config.get_text_config(decoder=True).hidden_size
    for each in found:
        _refuse_other_layout(each, width)
    return found


def _known(of: Callable[[nn.Module], list[Writer]], layer: nn.Module, index: int) -> list[Writer]:
    try:
        return of(layer)
    except InputError as error:
        raise InputError(f"layer {index}: {error}; an edit of the others would be partial: {STEER}") from error


def _refuse_other_layout(placed: PlacedWriter, width: int) -> None:
    """Raises InputError for weights of several experts that are neither modules nor run by transformers' own loops."""
    writer = placed.writer
    if is_fused(writer):
        # Set by what makes a class one of transformers' experts, which can be run one by one.
        is_known = hasattr(writer.module, "is_transposed")
        is_known = is_known and writer.weight.shape[-1 if is_transposed(writer) else -2] == width
    else:
        n_out = getattr(writer.module, "out_features", None) or getattr(writer.module, "nf", None)
        is_known = writer.weight.ndim == 2 and n_out in (None, width)
    if not is_known:
        raise InputError(
            f"{placed.name}: {type(writer.module).__name__} holds {tuple(writer.weight.shape)} in a layout that cannot "
            f"be edited, of (…, {width}, inputs) each; {STEER}"
        )


def _refuse_shared(found: Sequence[PlacedWriter]) -> None:
    seen: dict[int, PlacedWriter] = {}
    for each in found:
        first = seen.setdefault(id(each.writer.weight), each)
        if first is not each:
            raise InputError(
                f"{first.name} and {each.name} are one weight: an edit of one layer would be one of both; models whose "
                f"layers share weights cannot be edited"
            )


def matrix(writer: Writer) -> Tensor:
    """
    A writer's weight as (d_model, inputs), fused experts (experts, d_model, inputs), with what LoRA adapters add to it;
    float32, and the model's own memory where that is so stored. Raises InputError for a quantisation that is not
    bitsandbytes' 4-bit one, and for an adapter that does more than add.
    """
    weight = writer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise InputError(
            f"{writer.path}: its weights are stored as {weight.dtype}, a quantised format that cannot be edited; take "
            f"the model in bfloat16 or float32, or --quantization nf4 for the search"
        )
    weight = weight.detach().float()
    if isinstance(writer.module, LoraLayer):
        weight = weight + _added_by_adapters(writer)
    return weight.mT if is_transposed(writer) else weight


def matrix_shape(writer: Writer) -> tuple[int, ...]:
    """([experts,] d_model, inputs) of a writer, without computing its matrix."""
    state = getattr(writer.weight, "quant_state", None)
    *experts, rows, columns = writer.weight.shape if state is None else state.shape
    return (*experts, columns, rows) if is_transposed(writer) else (*experts, rows, columns)


def stored_as(writer: Writer) -> str:
    """How a writer's weight is stored, in words."""
    path = re.search(r"\.\d+(\.|$)", writer.path)
    parts = [f"{len(writer.weight)} fused experts" if is_fused(writer) else "an expert each" if path else "dense"]
    if getattr(writer.weight, "quant_state", None) is not None:
        parts.append("4-bit")
    if isinstance(writer.module, LoraLayer):
        parts.append("with LoRA")
    return ", ".join(parts)


def _added_by_adapters(writer: Writer) -> Tensor | float:
    """What the adapters that act on a writer add to its weight, as that is stored."""
    module: Any = writer.module
    names = (
        [] if module.merged or module.disable_adapters else [n for n in module.active_adapters if n in module.lora_A]
    )
    if any(name in module.lora_variant for name in names):
        raise InputError(
            f"{writer.path}: its adapter is of a kind (DoRA, for one) that does more than add to the weight; merge it "
            f"into the model first"
        )
    return sum(module.get_delta_weight(name).detach().float() for name in names)


def is_transposed(writer: Writer) -> bool:
    """Whether the weight is stored as (inputs, d_model)."""
    module: Any = writer.module
    module = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "is_transposed", False))
