"""
Hook points of decoder layers: read, or replace, the hidden states that flow through them.

| hook point | what it is |
|---|---|
| `resid_pre` | the residual stream as it enters a decoder block |
| `attn_out` | what the block's attention module returns (before the second norm of a Gemma 2 or 3) |
| `mlp_out` | what the block's feed-forward module returns (likewise) |
| `resid_post` | the residual stream as it leaves the block; of the last block too it is before the model's final norm |
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.common.directions_file import HOOK_POINTS
from src.common.errors import InputError
from src.models.architectures import attention, decoder_layers, mlp

Change = Callable[[Tensor], Tensor | None]
"""Gets the hidden states (rows, positions, d_model); returns those that go on instead, or None to leave them."""


class Location(NamedTuple):
    """Where in a model: equal to the plain tuple (layer, hook_point)."""

    layer: int
    """Index of the decoder block, from 0."""
    hook_point: str

    def __str__(self) -> str:
        return f"{self.hook_point} of layer {self.layer}"


@contextmanager
def reading(model: nn.Module, callbacks: Mapping[tuple[int, str], Callable[[Tensor], object]]) -> Iterator[None]:
    """
    Within the context, each callback gets the hidden states (rows, positions, d_model) that flow through its
    (layer, hook_point), padding included, in every forward call; what it returns is ignored.

    The tensor is the model's own: a callback must not change it in place. Of two contexts on one hook point the one
    entered later sees what the earlier one has made of the hidden states. Raises InputError for a layer or hook point
    that the model lacks, and RuntimeError at the end when a callback never ran.
    """
    with replacing(model, {place: _only_reads(callback) for place, callback in callbacks.items()}):
        yield


@contextmanager
def replacing(model: nn.Module, changes: Mapping[tuple[int, str], Change]) -> Iterator[None]:
    """
    Within the context, what each function returns goes on in place of the hidden states it got, in every forward call.

    No hook stays after the context, however it ends; what a function raises comes out of the forward call. Raises
    InputError for a layer or hook point that the model lacks, and RuntimeError at the end when a function never ran.
    """
    layers = decoder_layers(model)
    places = {Location(*place): change for place, change in changes.items()}
    for place in places:
        _refuse_unknown(place, len(layers))
    runs: dict[Location, int] = dict.fromkeys(places, 0)
    with ExitStack() as stack:
        for place, change in places.items():
            for handle in _attach(layers[place.layer], place, change, runs):
                stack.callback(handle.remove)
        yield
        # Not reached when the block raised: that error is the one to see.
        for place, n_runs in runs.items():
            if not n_runs:
                module = _module(layers[place.layer], place.hook_point)
                raise RuntimeError(f"the hook at {place} ({type(module).__name__}) never ran, so it had no effect")


def _only_reads(callback: Callable[[Tensor], object]) -> Change:
    def read(hidden: Tensor) -> None:
        callback(hidden)

    return read


def _refuse_unknown(place: Location, n_layers: int) -> None:
    if place.hook_point not in HOOK_POINTS:
        raise InputError(f"hook point {place.hook_point!r}: expected one of {', '.join(HOOK_POINTS)}")
    if not 0 <= place.layer < n_layers:
        raise InputError(f"layer {place.layer}: the model's layers are 0 to {n_layers - 1}")


def _module(layer: nn.Module, hook_point: str) -> nn.Module:
    match hook_point:
        case "attn_out":
            return attention(layer)
        case "mlp_out":
            return mlp(layer)
    return layer


def _attach(
    layer: nn.Module, place: Location, change: Change, runs: dict[Location, int]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks of one hook point on its layer."""

    def changed(hidden: Tensor) -> Tensor | None:
        runs[place] += 1
        return change(hidden)

    if place.hook_point == "resid_pre":
        return [layer.register_forward_pre_hook(_input_hook(changed), with_kwargs=True)]
    if place.hook_point == "resid_post":
        return [layer.register_forward_hook(_output_hook(changed, lambda: None))]
    # Some modules get the tokens of all rows in one dimension (OPT's feed-forward): the block's input has the shape.
    shape: list[torch.Size] = []

    def note_shape(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        shape[:] = [_checked(_hidden_input(args, kwargs)).shape]

    module = _module(layer, place.hook_point)
    return [
        layer.register_forward_pre_hook(note_shape, with_kwargs=True),
        module.register_forward_hook(_output_hook(changed, lambda: shape[0])),
    ]


def _hidden_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _input_hook(change: Change) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        hidden = change(_checked(_hidden_input(args, kwargs)))
        if hidden is None:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return hook


def _output_hook(change: Change, shape: Callable[[], torch.Size | None]) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        old = output[0] if isinstance(output, tuple) else output
        new = change(_checked(old if shape() is None else old.reshape(shape())))
        if new is None:
            return None
        new = new.reshape(old.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _checked(hidden: Tensor) -> Tensor:
    if hidden.dim() != 3:
        raise InputError(
            f"hidden states of shape {tuple(hidden.shape)}; expected (rows, positions, d_model): models with several "
            "residual streams (Gemma 3n) can be neither read nor steered"
        )
    return hidden
