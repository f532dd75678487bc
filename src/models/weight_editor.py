"""
Edits of the weights that write to the residual stream: acting by hooks while they are searched for, or written into the
weights. Hooks touch no weight and copy none; without them every bit is as before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from src.common.errors import InputError
from src.models.architectures import Writer, attention_writer, decoder_layers, mlp_writers
from src.models.expert_edits import editing_experts, is_fused
from src.ops.weight_edits import WeightEdit, edited

COMPONENTS = {"attn": "attention", "mlp": "mlp"}
Edits = Mapping[str, WeightEdit]
"""Name of a writer → what is done to its weight; writers that are not named stay as they are."""


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


def residual_writers(model: nn.Module, components: Sequence[str] = tuple(COMPONENTS)) -> list[PlacedWriter]:
    """
    Every weight of the components (attn, mlp) that writes to the residual stream, layer by layer. Raises InputError
    where a layer has none, for a weight that two layers share (an edit of one would be one of both), and for an adapter
    on fused experts, whose part of their weights is out of reach.
    """
    if any(type(module).__name__ == "ParamWrapper" for module in model.modules()):
        raise InputError(
            "the adapter acts on fused experts, where it cannot be edited along; merge it into the model first"
        )
    found = []
    for i, layer in enumerate(decoder_layers(model)):
        of = {"attn": lambda layer=layer: [attention_writer(layer)], "mlp": lambda layer=layer: mlp_writers(layer)}
        found += [
            PlacedWriter(layer=i, component=name, writer=each) for name in components for each in _known(of[name])
        ]
    if not found:
        raise InputError(f"no layer of {type(model).__name__} has a writer of {', '.join(components)}")
    _refuse_shared(found)
    return found


def _known(of: Callable[[], list[Writer]]) -> list[Writer]:
    try:
        return of()
    except InputError:
        # A hybrid model's layer without attention, or without a feed-forward part.
        return []


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


class RowsOfTrials:
    """Which trial's edits act on each row of a batch."""

    def __init__(self, n_trials: int) -> None:
        self.n_trials = n_trials
        self.rows: list[int] | None = None
        """Trial of each row of the next forward calls; None where there is one trial."""

    def index(self, n_rows: int, device: torch.device) -> Tensor:
        """int64 (n_rows,)."""
        if self.rows is None or len(self.rows) != n_rows:
            raise RuntimeError(f"{n_rows} rows, and the trials of {self.rows and len(self.rows)} are known")
        return torch.tensor(self.rows, device=device)


@contextmanager
def editing(model: nn.Module, writers: Sequence[PlacedWriter], trials: Sequence[Edits]) -> Iterator[RowsOfTrials]:
    """
    Within the context the writers' outputs are those of the edited weights. Of several trials, each acts on the rows
    of a batch that `rows` of what this yields gives it: set it before each forward call, also when rows leave.

    Raises InputError for several trials where experts are fused, whose tokens no longer know their rows, and
    RuntimeError when an edit did not act although the model ran.
    """
    rows = RowsOfTrials(len(trials))
    by_name = {each.name: each for each in writers}
    unknown = {name for trial in trials for name in trial} - by_name.keys()
    assert not unknown, f"edits of {sorted(unknown)}, which are not among the writers"
    with ExitStack() as stack:
        ran: dict[str, int] = {}
        calls = [0]
        watcher = model.register_forward_pre_hook(lambda module, args: calls.__setitem__(0, calls[0] + 1))
        stack.callback(watcher.remove)
        for name in dict.fromkeys(name for trial in trials for name in trial):
            ran[name] = 0
            _attach(stack, model, by_name[name], [trial.get(name) for trial in trials], rows, ran)
        yield rows
        idle = [name for name, n_runs in ran.items() if calls[0] and not n_runs]
        if idle:
            raise RuntimeError(f"the edits of {', '.join(idle)} did not act: these modules did not run")


def _attach(
    stack: ExitStack, model: nn.Module, placed: PlacedWriter, edits: Sequence[WeightEdit | None], rows: RowsOfTrials,
    ran: dict[str, int],
) -> None:  # fmt: skip
    module, name = placed.writer.module, placed.name

    def note() -> None:
        ran[name] += 1

    if is_fused(placed.writer):
        if len(edits) > 1:
            raise InputError("several trials at once in a model with fused experts; take --trials_per_batch 1")
        stack.enter_context(editing_experts(model, placed.writer, edits[0], note))
        return
    act = _One(edits[0], module) if len(edits) == 1 else _Several(edits, module, rows)
    if act.t is not None:
        stack.callback(module.register_forward_pre_hook(lambda module, args: act.before(args)).remove)

    def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        note()
        return act.after(args[0], output)

    stack.callback(module.register_forward_hook(after).remove)


class _One:
    """One edit on every row."""

    def __init__(self, edit: WeightEdit, module: nn.Module) -> None:
        self.edit = edit.to(_device(module))
        self.t = self.edit.t
        self._own_bias = getattr(module, "bias", None)

    def before(self, args: tuple) -> tuple:
        return (args[0] * self.t.to(args[0].dtype), *args[1:])

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        e = self.edit
        return _changed(x, y, e.u.mT, e.a.mT, e.s, e.bias, self._own_bias)


class _Several:
    """Edits of several trials, each on rows of its own."""

    def __init__(self, edits: Sequence[WeightEdit | None], module: nn.Module, rows: RowsOfTrials) -> None:
        device = _device(module)
        present = [edit for edit in edits if edit is not None]
        k = max(edit.u.shape[-1] for edit in present)
        (d, _), (_, n) = present[0].u.shape, present[0].a.shape
        some = lambda name: any(getattr(edit, name) is not None for edit in present)  # noqa: E731
        self._u, self._a = torch.zeros(len(edits), k, d, device=device), torch.zeros(len(edits), n, k, device=device)
        self._s = torch.ones(len(edits), 1, d, device=device) if some("s") else None
        self.t = torch.ones(len(edits), 1, n, device=device) if some("t") else None
        self._bias = torch.zeros(len(edits), 1, d, device=device) if some("bias") else None
        for i, edit in enumerate(edits):
            if edit is not None:
                width = edit.u.shape[-1]
                self._u[i, :width], self._a[i, :, :width] = edit.u.mT, edit.a.mT
                for table, value in ((self._s, edit.s), (self.t, edit.t), (self._bias, edit.bias)):
                    if value is not None:
                        table[i, 0] = value
        self._rows = rows
        self._own_bias = getattr(module, "bias", None)

    def before(self, args: tuple) -> tuple:
        x = args[0]
        index = self._rows.index(len(x), x.device)
        return (x * self.t[index].to(x.dtype), *args[1:])

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        index = self._rows.index(len(x), x.device)
        pick = lambda table: None if table is None else table[index]  # noqa: E731
        return _changed(x, y, self._u[index], self._a[index], pick(self._s), pick(self._bias), self._own_bias)


def _changed(
    x: Tensor, y: Tensor, u: Tensor, a: Tensor, s: Tensor | None, bias: Tensor | None, own_bias: Tensor | None
) -> Tensor:
    """y' of an edit, in float32; u (…, k, d) and a (…, n, k) transposed. The module's own bias is no weight."""
    found = y.float()
    if s is not None:
        found = found * s if own_bias is None else (found - own_bias.float()) * s + own_bias.float()
    found = found - (x.float() @ a) @ u
    return (found if bias is None else found + bias).to(y.dtype)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@torch.no_grad()
def bake(model: nn.Module, edits: Edits, components: Sequence[str] = tuple(COMPONENTS)) -> None:
    """
    Write the edits into the model's weights, computed in float32 and stored in the weights' own dtype. Raises
    InputError for a quantised weight, and for a bias where the architecture has none.
    """
    by_name = {each.name: each for each in residual_writers(model, components)}
    for name, edit in edits.items():
        writer = by_name[name].writer
        assert not isinstance(writer.module, LoraLayer), f"{name}: an edit under an adapter; merge that first"
        if getattr(writer.weight, "quant_state", None) is not None:
            raise InputError(f"{name}: an edit cannot be written into quantised weights; take --quantization none")
        new = edited(matrix(writer), edit.to(writer.weight.device))
        writer.weight.copy_(new.mT if is_transposed(writer) else new)
        if edit.bias is not None:
            _add_bias(model, by_name[name], edit.bias)


def _add_bias(model: nn.Module, placed: PlacedWriter, bias: Tensor) -> None:
    module: Any = placed.writer.module
    if getattr(module, "bias", None) is None:
        _make_biases(model, placed)
    module.bias.add_(bias.to(module.bias))


def _make_biases(model: nn.Module, placed: PlacedWriter) -> None:
    """Zeros where the architecture knows biases but this model has none, in every layer: one setting stands for all."""
    config = model.config.get_text_config(decoder=True)
    if placed.component != "mlp" or not hasattr(config, "mlp_bias") or is_fused(placed.writer):
        raise InputError(
            f"{placed.name}: {config.model_type} models have no bias there to hold what is added; steer with the "
            f"directions file instead (--steer), or save an edit without --induce"
        )
    config.mlp_bias = True
    parents = {each.writer.path.rpartition(".")[0] for each in residual_writers(model, ("mlp",))}
    for layer in decoder_layers(model):
        for path in parents:
            for linear in layer.get_submodule(path).children():
                if isinstance(linear, nn.Linear) and linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
