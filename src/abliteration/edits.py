"""From a plan to the edits of a model: directions, heads, calibration and what is added come together here."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from src.abliteration.kernel import Plan
from src.common.directions_file import Directions
from src.common.errors import InputError
from src.models.attention_heads import heads_of
from src.models.post_norms import gains_behind
from src.models.residual_writers import PlacedWriter, matrix, residual_writers
from src.ops.weight_edits import Products, WeightEdit, orthonormal_mix, products, weight_edit


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """What holds for every trial."""

    components: tuple[str, ...] = ("attn", "mlp")
    norm: str = "none"
    heads: Mapping[int, tuple[int, ...]] | None = None
    """Layer → attention heads whose outputs are edited; layers that are not named keep their attention whole."""
    calibration: Sequence[float] | None = None
    """Factor of the edit weights of each layer."""
    added: Mapping[int, Tensor] | None = None
    """Layer → float32 (d_model,), added to what its feed-forward part writes."""


class _Span:
    """All layers' directions as one writer gets them: behind a norm with a gain, times that gain."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        """float32 (n_layers·k, d_model)"""
        self.gram = rows.double() @ rows.double().mT


class EditMaker:
    """The edits of one model by one directions file. What depends on the weights alone is computed once."""

    def __init__(self, model: nn.Module, directions: Directions, options: EditOptions) -> None:
        """Raises InputError for layers without directions, heads that the model lacks, and weights as `matrix` does."""
        self.writers = residual_writers(model, options.components)
        self.n_layers = directions.n_layers
        missing = sorted(set(range(self.n_layers)) - set(directions.layers_present))
        if missing:
            raise InputError(
                f"{directions.source}: no directions of layer {missing[0]}; extract them with --layers all"
            )
        self.options = options
        self._k = directions.k
        self._span = _Span(torch.from_numpy(directions.directions.reshape(-1, directions.d_model).copy()))
        self.gains = gains_behind(model, self.writers)
        self._spans = {
            name: _Span(self._span.rows * (gain / gain.square().mean().sqrt())) for name, gain in self.gains.items()
        }
        self._refuse_odd_heads(options.heads or ())
        self._masks = {each.name: self._mask(each, model) for each in self.writers}
        if options.added:
            self._refuse_missing_mlp(options.added)

    @cached_property
    def _products(self) -> dict[str, Products]:
        return {
            each.name: products(
                matrix(each.writer), self._span_of(each.name).rows, self.options.norm, self._masks[each.name]
            )
            for each in self.writers
        }

    def edits(self, plan: Plan) -> dict[str, WeightEdit]:
        """What a plan does to each writer; those of weight 0 are left out."""
        found = {}
        for each in self.writers:
            weight = self.weight(plan, each)
            if weight:
                mix = orthonormal_mix(self._span_of(each.name).gram, self._mix(plan, each.layer))
                found[each.name] = weight_edit(self._products[each.name], mix, torch.full((mix.shape[1],), weight))
        return found | {name: replace(found.get(name, edit), bias=edit.bias) for name, edit in self.additions().items()}

    def additions(self) -> dict[str, WeightEdit]:
        """What is added whatever the plan, alone."""
        added = {self.adding(layer).name: vector for layer, vector in (self.options.added or {}).items()}
        return {name: replace(self._idle(name), bias=vector) for name, vector in added.items()}

    def weight(self, plan: Plan, placed: PlacedWriter) -> float:
        """The edit weight of a writer."""
        return self.factor(placed.layer, placed.component) * plan.weight(placed.component, placed.layer)

    def factor(self, layer: int, component: str) -> float:
        """What a plan's weight is multiplied by: 0 for attention whose heads are none of those asked for."""
        if component == "attn" and self.options.heads is not None and layer not in self.options.heads:
            return 0.0
        return self.options.calibration[layer] if self.options.calibration else 1.0

    def _span_of(self, name: str) -> "_Span":
        return self._spans.get(name, self._span)

    def _mix(self, plan: Plan, layer: int) -> Tensor:
        """(n_layers·k, k): the shares of all directions in those of a layer."""
        mix = torch.zeros(len(self._span.rows), self._k)
        sources = plan.sources(layer)
        first = next(iter(sources))
        for source, share in sources.items():
            for k in range(self._k):
                # A direction's sign makes no difference to an edit; between two layers opposite ones would cancel out.
                is_opposite = self._span.gram[first * self._k + k, source * self._k + k] < 0
                mix[source * self._k + k, k] = -share if is_opposite else share
        return mix

    def _mask(self, placed: PlacedWriter, model: nn.Module) -> Tensor | None:
        heads = (self.options.heads or {}).get(placed.layer)
        if placed.component != "attn" or heads is None:
            return None
        n_heads, width = heads_of(model, placed)
        if not set(heads) <= set(range(n_heads)):
            raise InputError(
                f"--heads: layer {placed.layer} has heads 0 to {n_heads - 1}, and {list(heads)} are asked for"
            )
        mask = torch.zeros(n_heads, dtype=torch.bool)
        mask[list(heads)] = True
        return mask.repeat_interleave(width)

    def _refuse_odd_heads(self, layers: Iterable[int]) -> None:
        attentions = Counter(each.layer for each in self.writers if each.component == "attn")
        for layer in layers:
            if layer >= self.n_layers:
                raise InputError(f"--heads: layer {layer}: the model's layers are 0 to {self.n_layers - 1}")
            if attentions[layer] != 1:
                raise InputError(
                    f"--heads: layer {layer} has {attentions[layer]} parts that mix tokens; expected one, whose heads "
                    f"can be told apart"
                )

    def _idle(self, name: str) -> WeightEdit:
        found = self._products[name]
        return WeightEdit(u=found.directions.new_zeros(found.directions.shape[1], 0), a=found.a[..., :0, :])

    def adding(self, layer: int) -> PlacedWriter:
        """The writer that what is added to a layer goes by the name of."""
        return next(each for each in self.writers if each.layer == layer and each.component == "mlp")

    def _refuse_missing_mlp(self, added: Mapping[int, Tensor]) -> None:
        with_mlp = {each.layer for each in self.writers if each.component == "mlp"}
        lacking = sorted(set(added) - with_mlp)
        if lacking:
            raise InputError(f"--induce: layer {lacking[0]} has no feed-forward part that is edited; see --components")
