"""
Edits of the weights that write to the residual stream: acting by hooks while they are searched for, or written into the
weights. Hooks touch no weight and copy none; without them every bit is as before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from src.common.errors import InputError
from src.models.added_biases import add_bias, block_that_adds
from src.models.expert_edits import editing_experts, is_fused
from src.models.residual_writers import COMPONENTS, PlacedWriter, is_transposed, matrix, residual_writers
from src.ops.weight_edits import WeightEdit, edited

Edits = Mapping[str, WeightEdit]
"""Name of a writer → what is done to its weight; writers that are not named stay as they are."""


class RowsOfTrials:
    """Which trial's edits act on each row of a batch."""

    def __init__(self, n_trials: int) -> None:
        self.n_trials = n_trials
        self.rows: list[int] | None = None
        """Trial of each row of the next forward calls; None where there is one trial."""

    def index_of(self, x: Tensor) -> Tensor:
        """int64 (rows,), of a module's input (rows, tokens, inputs). Raises InputError where rows are run together."""
        if x.ndim != 3:
            raise InputError(
                f"several trials at once in a model that runs the tokens of all rows together ({tuple(x.shape)}); take "
                f"--trials_per_batch 1"
            )
        return self.index(len(x), x.device)

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
            edits = [trial.get(name) for trial in trials]
            if any(edit is not None and edit.bias is not None for edit in edits):
                edits = _attach_to_block(stack, model, by_name[name], edits, rows, ran)
            if any(edits):
                _attach(stack, model, by_name[name], edits, rows, ran)
        yield rows
        idle = [name for name, n_runs in ran.items() if calls[0] and not n_runs]
        if idle:
            raise RuntimeError(f"the edits of {', '.join(idle)} did not act: these modules did not run")


def _attach_to_block(
    stack: ExitStack, model: nn.Module, placed: PlacedWriter, edits: Sequence[WeightEdit | None], rows: RowsOfTrials,
    ran: dict[str, int],
) -> list[WeightEdit | None]:  # fmt: skip
    """Have a block add the biases where the writer's own module cannot; returns what is left for the writer."""
    block = block_that_adds(model, placed)
    if block is None:
        return list(edits)
    device = _device(block)
    biases = [None if edit is None else edit.bias for edit in edits]
    width = next(bias.shape[0] for bias in biases if bias is not None)
    table = torch.stack([torch.zeros(width) if bias is None else bias.float().cpu() for bias in biases]).to(device)

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        ran[placed.name] += 1
        y = output[0] if isinstance(output, tuple) else output
        added = table[0] if len(table) == 1 else table[rows.index(len(y), y.device)][:, None]
        new = (y.float() + added.to(y.device)).to(y.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    stack.callback(block.register_forward_hook(after).remove)
    rest = [None if edit is None else replace(edit, bias=None) for edit in edits]
    return [None if edit is None or _is_idle(edit) else edit for edit in rest]


def _is_idle(edit: WeightEdit) -> bool:
    return not edit.u.shape[-1] and edit.s is None and edit.t is None


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
        index = self._rows.index_of(x)
        return (x * self.t[index].to(x.dtype), *args[1:])

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        index = self._rows.index_of(x)
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
def bake(model: nn.Module, edits: Edits, components: Sequence[str] = COMPONENTS) -> None:
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
            add_bias(model, by_name[name], edit.bias)
