"""
Edits of fused experts: one parameter holds the weights of all, and no module runs for one of them alone. The products
with the edited parameter's slices are found where they are computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from src.models.architectures import Writer
from src.ops.weight_edits import WeightEdit

IMPLEMENTATION = "eager"
"""Of transformers' ways to run experts the one with a product an expert, which can be found."""


def is_fused(writer: Writer) -> bool:
    """Whether one parameter holds the weights of several experts."""
    return writer.parameter != "weight"


@contextmanager
def editing_experts(model: nn.Module, writer: Writer, edit: WeightEdit, ran: Callable[[], None]) -> Iterator[None]:
    """
    Within the context the experts' outputs are those of the edited weights; edit: of (experts, d_model, inputs).
    `ran` is called after each forward call in which it acted.
    """
    module: Any = writer.module
    before = getattr(model.config, "_experts_implementation", None)
    assert "forward" not in vars(module), f"{writer.path} has a forward of its own: two edits of it at once?"
    plain = module.forward
    edit = edit.to(writer.weight.device)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Products(writer.weight, edit) as mode:
            output = plain(*args, **kwargs)
        if not mode.n_edited:
            raise RuntimeError(f"{writer.path}: its experts' products could not be found, so that no edit acts on them")
        ran()
        return output

    module.forward = forward
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        del module.forward
        model.set_experts_implementation(before)


class _Products(TorchFunctionMode):
    """Follows a parameter's slices into the products that are computed with them."""

    def __init__(self, parameter: nn.Parameter, edit: WeightEdit) -> None:
        super().__init__()
        self._parameter = parameter
        self._edit = edit
        self._slices: dict[int, tuple[Tensor, int]] = {}
        self.n_edited = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and args[0] is self._parameter:
            found = func(*args, **kwargs)
            # Kept, so that its id stays its own.
            self._slices[id(found)] = (found, int(args[1]))
            return found
        is_product = func in (functional.linear, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul)
        if is_product and len(args) > 1 and id(args[1]) in self._slices:
            return self._edited(func, args, kwargs)
        return func(*args, **kwargs)

    def _edited(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        x, weight, *rest = args
        assert not rest and not kwargs, "a product with a bias of its own"
        expert, edit = self._slices[id(weight)][1], self._edit
        if edit.t is not None:
            x = x * edit.t[expert].to(x.dtype)
        y = func(x, weight).float()
        if edit.s is not None:
            y = y * edit.s[expert]
        self.n_edited += 1
        changed = y - (x.float() @ edit.a[expert].mT) @ _of(edit.u, expert).mT
        return changed.to(x.dtype)


def _of(u: Tensor, expert: int) -> Tensor:
    """u has no dimension of experts where it is the same for all."""
    return u if u.dim() == 2 else u[expert]
