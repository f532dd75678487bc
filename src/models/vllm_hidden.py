"""
Hidden states as they flow through vLLM's layers: one row a token of all requests, the residual stream often in two
parts that the next norm adds.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from src.common.capture_spec import OUTPUT
from src.common.directions_file import HOOK_POINTS
from src.common.errors import InputError
from src.models.architectures import attention, decoder_layers, mlp
from src.models.hooks import Location


class Hidden:
    """
    The hidden states of a step at one location, (tokens, d_model), read and changed in place.

    rest: the part of the residual stream that is still to be added, where the model keeps it apart. A change goes into
    it whole, with zeros in the other part, so that the sum is rounded once and tokens that nobody changes stay bit for
    bit.
    """

    def __init__(self, hidden: Tensor, rest: Tensor | None) -> None:
        if not one_row_a_token(hidden):
            raise RuntimeError(f"hidden states of shape {tuple(hidden.shape)}; expected one row a token")
        self._hidden = hidden.view(-1, hidden.shape[-1])
        self._rest = None if rest is None else rest.view(-1, rest.shape[-1])

    @property
    def width(self) -> int:
        """d_model."""
        return self._hidden.shape[1]

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    def __len__(self) -> int:
        return len(self._hidden)

    def __getitem__(self, tokens: Tensor | slice) -> Tensor:
        """A copy of the hidden states of some tokens."""
        if self._rest is None:
            return self._hidden[tokens].clone() if isinstance(tokens, slice) else self._hidden[tokens]
        return self._hidden[tokens] + self._rest[tokens]

    def __setitem__(self, tokens: Tensor, new: Tensor) -> None:
        if self._rest is None:
            self._hidden[tokens] = new
        else:
            self._rest[tokens] = new.to(self._rest.dtype)
            self._hidden[tokens] = 0


def local_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder layers that this pipeline rank holds, by their index in the whole model."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return {i: layer for i, layer in enumerate(decoder_layers(model)) if not isinstance(layer, PPMissingLayer)}


def hook(
    layer: nn.Module, place: Location, parts: bool, see: Callable[[Hidden], None]
) -> torch.utils.hooks.RemovableHandle:
    """
    Call `see` with the hidden states at a location in every forward call of its layer, of the whole model for `output`.

    parts: whether the two tensors that layers pass on add up to the residual stream; else the first is it. Raises
    InputError when the layer has no such location.
    """
    if place.hook_point == "resid_pre":
        names = _inputs(layer)

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            see(Hidden(given["hidden_states"], given.get("residual") if parts else None))

        return layer.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        if isinstance(output, tuple) and place.hook_point == "resid_post":
            see(Hidden(output[0], output[1] if parts else None))
        else:
            see(Hidden(output[0] if isinstance(output, tuple) else output, None))

    return _module(layer, place).register_forward_hook(after)


def one_row_a_token(hidden: Tensor) -> bool:
    """Whether hidden states are (tokens, d_model), ones in front or not, and not several streams of them."""
    return hidden.dim() >= 2 and hidden.numel() == hidden.shape[-2] * hidden.shape[-1]


def lacking(layers: Mapping[int, nn.Module]) -> dict[tuple[int, str], str]:
    """(layer, hook point) → why hidden states can be neither changed nor kept there; those where they can left out."""
    found = {}
    for i, layer in layers.items():
        for hook_point in HOOK_POINTS:
            try:
                if hook_point == "resid_pre":
                    _inputs(layer)
                elif hook_point != "resid_post":
                    _refuse_parts_of_a_sum(_module(layer, Location(i, hook_point)))
            except InputError as error:
                found[i, hook_point] = str(error)
    return found


def rewriting(reading: str, ran: Callable[[], None]) -> Callable[[nn.Module, tuple, Any], None]:
    """A forward hook that moves the parts of a layer's output about, as `WorkerSteering.rewrite` says."""

    def rewrite(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        hidden, *others = output if isinstance(output, tuple) else (output,)
        rest = next((each for each in others[:1] if isinstance(each, Tensor)), hidden)
        if not isinstance(hidden, Tensor) or not one_row_a_token(hidden) or rest.shape != hidden.shape:
            return
        ran()
        if rest is not hidden:
            if reading == "sum":
                rest.add_(hidden)
                hidden.zero_()
            else:
                rest.zero_()

    return rewrite


Change = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Hidden states in one part or in two that are to be added → what goes on instead."""


def traced_hook(layer: nn.Module, place: Location, change: Change) -> torch.utils.hooks.RemovableHandle:
    """
    As `hook`, for a layer that is about to be compiled: what `change` returns goes on, nothing is changed in place. Of
    the two tensors that layers pass on it is taken that they add up.
    """
    if place.hook_point == "resid_pre":
        names = _inputs(layer)

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            hidden, rest = change(given["hidden_states"], given.get("residual"))
            return (), {**given, "hidden_states": hidden, **({"residual": rest} if "residual" in given else {})}

        return layer.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if not isinstance(output, tuple):
            return change(output, None)[0]
        if place.hook_point == "resid_post":
            return (*change(output[0], output[1]), *output[2:])
        return (change(output[0], None)[0], *output[1:])

    return _module(layer, place).register_forward_hook(after)


def _inputs(layer: nn.Module) -> list[str]:
    names = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in names:
        raise InputError(f"{type(layer).__name__} has no input called hidden_states; take resid_post")
    return names


def _refuse_parts_of_a_sum(module: nn.Module) -> None:
    """Raises InputError where the layer, and not the module, adds up what a tensor-parallel group's devices have."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    for each in (module, *module.children()):
        if isinstance(each, RowParallelLinear) and each.tp_size > 1 and not each.reduce_results:
            raise InputError(
                f"each device has a part of what {type(module).__name__} gives; take resid_post, or "
                f"--tensor_parallel_size 1"
            )


def _module(layer: nn.Module, place: Location) -> nn.Module:
    if place.hook_point in ("resid_post", OUTPUT):
        return layer
    return (attention if place.hook_point == "attn_out" else mlp)(layer)
