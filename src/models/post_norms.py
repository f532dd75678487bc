"""
Norms between a part of a layer and the residual stream (Gemma 2 to 4, OLMo 2 and 3, GLM-4), found where they act.

An RMS norm with gain g makes g ⊙ W·x / rms of what W writes. Its product with v is that of W·x with g ⊙ v, over rms: to
take v from the stream is to take g ⊙ v from W.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from src.common.errors import InputError
from src.models.architectures import decoder_layers
from src.models.residual_writers import STEER, PlacedWriter

ALIKE = 1e-3
"""Largest difference, of the largest gain, that two inputs may make to what is found of one."""
N_TOKENS = 16


@torch.inference_mode()
def run_short(model: nn.Module) -> None:
    """A forward call of a few tokens, for what hooks see of it."""
    table = model.get_input_embeddings().weight
    model(input_ids=(torch.arange(10, 10 + N_TOKENS, device=table.device) % len(table))[None], use_cache=False)


def gains_behind(model: nn.Module, writers: Sequence[PlacedWriter]) -> dict[str, Tensor]:
    """
    Name of each writer whose output a norm multiplies before it is added → float32 (d_model,), by what; of several
    norms the product. Runs a few tokens. Raises InputError for a norm that is no RMS norm with gains.
    """
    layers = decoder_layers(model)
    by_layer: dict[int, set[str]] = {}
    for each in writers:
        by_layer.setdefault(each.layer, set()).add(_part(each))
    traces = {layer: _Trace(parts) for layer, parts in by_layer.items()}
    with ExitStack() as stack:
        for layer, trace in traces.items():
            stack.enter_context(trace.following(layers[layer]))
        run_short(model)
    found = {}
    for each in writers:
        norms = traces[each.layer].norms(_part(each))
        if norms:
            gains = [_gain(layers[each.layer].get_submodule(name), f"layer {each.layer}: {name}") for name in norms]
            found[each.name] = torch.stack(gains).prod(dim=0)
    return found


def _part(placed: PlacedWriter) -> str:
    """The layer's child that the writer is in."""
    return placed.writer.path.partition(".")[0]


def _is_norm(module: nn.Module) -> bool:
    dims = {parameter.dim() for parameter in module.parameters()}
    return dims == {1}


class _Trace:
    """What becomes of the outputs of a layer's parts, as far as only norms and sums are between."""

    def __init__(self, parts: set[str]) -> None:
        self._parts = parts
        self._made: list[tuple[Tensor, dict[str, tuple[str, ...]]]] = []
        """Outputs, and which parts are in them, each behind which norms. Kept, so that their memory stays theirs."""

    @contextmanager
    def following(self, layer: nn.Module) -> Iterator[None]:
        """Within the context forward calls of the layer are followed."""
        with ExitStack() as stack:
            for name, child in layer.named_children():
                if _is_norm(child):
                    stack.callback(child.register_forward_hook(self._norm_ran(name)).remove)
                elif any(True for _ in child.parameters()):
                    stack.callback(child.register_forward_pre_hook(self._part_runs, with_kwargs=True).remove)
                if name in self._parts:
                    stack.callback(child.register_forward_hook(self._part_ran(name)).remove)
            yield

    def norms(self, part: str) -> tuple[str, ...]:
        """The norms that a part's output went through, in their order."""
        return max((of[part] for _, of in self._made if part in of), key=len, default=())

    def _part_runs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # What a part gets is no part's addition: BLOOM's parts return the stream itself, which the next norm is of.
        got = {each.data_ptr() for each in (*args, *kwargs.values()) if isinstance(each, Tensor)}
        self._made = [made for made in self._made if made[0].data_ptr() not in got]

    def _part_ran(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            self._made.append((output[0] if isinstance(output, tuple) else output, {name: ()}))

        return hook

    def _norm_ran(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            of = self._parts_in(args[0]) if args and isinstance(args[0], Tensor) else None
            if of:
                self._made.append((output, {part: (*norms, name) for part, norms in of.items()}))

        return hook

    def _parts_in(self, x: Tensor) -> dict[str, tuple[str, ...]] | None:
        for made, of in self._made:
            if made.data_ptr() == x.data_ptr() and made.numel() == x.numel():
                return of
        # Gemma 4 adds its dense and its routed part, each normed, before it norms the sum.
        for i, (one, of_one) in enumerate(self._made):
            for other, of_other in self._made[:i]:
                if one.shape == other.shape == x.shape and torch.equal(one + other, x):
                    return of_one | of_other
        return None


@torch.inference_mode()
def _gain(norm: nn.Module, place: str) -> Tensor:
    """float32 (d_model,), on the CPU, by what an RMS norm multiplies. Raises InputError for another norm."""
    weight = next(norm.parameters())
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        # Signs have a root mean square of 1, whatever they are, and a mean that differs.
        signs = torch.randint(0, 2, (1, 1, len(weight)), generator=generator).float() * 2 - 1
        # In float32, so that a norm stored in half precision answers in more than that.
        found.append((norm(signs.to(weight.device)).float().cpu() * signs).flatten())
    if (found[0] - found[1]).abs().max() > ALIKE * found[0].abs().max():
        raise InputError(
            f"{place} ({type(norm).__name__}) is between a writer and the residual stream, and is no RMS norm: no edit "
            f"of weights before it takes a direction out exactly; {STEER}"
        )
    return found[0]
