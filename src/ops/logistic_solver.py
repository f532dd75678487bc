"""
Many L2 logistic regressions at once by batched L-BFGS: all layers, folds and penalties in one set of matrix products.

Each problem minimises J(w, b) = ‖w‖²/(2·C·n) + mean log(1 + exp(−y·(w·x + b))) over its n rows, scikit-learn's
objective divided by C·n; the intercept b is not penalised. L-BFGS (Liu and Nocedal 1989) starts from the inverse of the
Hessian's approximate diagonal. The line search uses slopes only: J is convex, so a step where the slope is not yet
positive has lowered it, and slopes keep their digits where values of J no longer differ.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MEMORY = 10
"""Pairs of steps and gradient changes that L-BFGS keeps."""
OVERSHOOT = 0.1
"""A step is taken when the slope at its end is at most this share of the one at its start, with the other sign."""
NO_GRADIENT = 1e-14
"""A gradient below this share of the rows' root mean square length is rounding: the weights are 0 where they began."""
MAX_SHORTENINGS = 60
COMPACT_EVERY = 2
"""Iterations between looks at which layers and columns have no unfinished problem left, and need no more products."""


class Problems(NamedTuple):
    """Q problems on each of L layers. Only `design` differs between layers, only `row_weights` between problems."""

    design: Tensor
    """Float64 (L, n, r + 1): the rows; the last column is 1, for the intercept."""
    labels: Tensor
    """Float64 (n,): 1 target, 0 control."""
    row_weights: Tensor
    """Float64 (n, Q): 1 / (rows of the problem) for those that it is fitted on, else 0."""
    penalty: Tensor
    """Float64 (L, Q): 1 / (C · rows of the problem)."""


def solve(
    problems: Problems, tolerance: float = 1e-4, max_iterations: int = 2_000, first_layer: int = 0
) -> tuple[Tensor, int]:
    """
    Coefficients, float64 (L, r + 1, Q), and the number of iterations of the slowest problem.

    A problem is done when ‖∇J‖ ≤ tolerance · ‖w‖ / (C·n). J, minimised over b, is strongly convex in w with modulus
    1 / (C·n): w is then within about `tolerance` · ‖w‖ of the optimum. Raises RuntimeError when a problem is not done
    after `max_iterations`, and counts its layer from `first_layer`.
    """
    n_layers, _, width = problems.design.shape
    n_problems = problems.row_weights.shape[1]
    solution = problems.design.new_zeros(n_layers, width, n_problems)
    layers, columns = torch.arange(n_layers), torch.arange(n_problems)
    state = _State(problems)
    for iteration in range(max_iterations + 1):
        active = state.unfinished(tolerance)
        if iteration % COMPACT_EVERY == 0 or not active.any():
            solution[layers[:, None], :, columns] = state.x.mT
            if not active.any():
                return solution, iteration
            keep = active.any(dim=1).cpu(), active.any(dim=0).cpu()
            if not (keep[0].all() and keep[1].all()):
                layers, columns = layers[keep[0]], columns[keep[1]]
                state.keep(*(each.nonzero().flatten() for each in keep))
                active = state.unfinished(tolerance)
        state.step(active)
    layer, column = active.nonzero()[0].tolist()
    c_times_n = 1 / float(state.problems.penalty[layer, column])
    raise RuntimeError(
        f"{int(active.sum())} logistic regressions have not converged after {max_iterations} iterations, the first at "
        f"layer {first_layer + int(layers[layer])} with C · rows = {c_times_n:.6g}; a smaller C is easier"
    )


class _State:
    """Where every problem stands; all tensors (L, r + 1, Q) unless said."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        share = (problems.row_weights * problems.labels[:, None]).sum(dim=0)
        self.second_moments = problems.design.square().mT @ problems.row_weights
        self.x = torch.zeros_like(self.second_moments)
        self.x[:, -1] = (share / (1 - share)).log()
        self.logits = problems.design @ self.x
        """(L, n, Q)."""
        self.gradient = self._gradient()
        self.inverse_hessian = self._inverse_hessian()
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        """(step s, change of the gradient y, 1/⟨s, y⟩ of shape (L, 1, Q)), oldest first."""
        self.gamma = torch.ones_like(self.x[:, :1])

    def keep(self, layers: Tensor, columns: Tensor) -> None:
        """Go on with these layers and columns only."""
        device = self.x.device
        layers, columns = layers.to(device), columns.to(device)
        pick = lambda tensor: tensor[layers][..., columns]  # noqa: E731
        old = self.problems
        design = old.design if len(layers) == len(old.design) else old.design[layers]
        self.problems = Problems(design, old.labels, old.row_weights[:, columns], pick(old.penalty))
        for name in ("second_moments", "inverse_hessian", "x", "logits", "gradient", "gamma"):
            setattr(self, name, pick(getattr(self, name)))
        self.pairs = [(pick(s), pick(y), pick(rho)) for s, y, rho in self.pairs]

    def unfinished(self, tolerance: float) -> Tensor:
        """Bool (L, Q)."""
        enough = tolerance * self.problems.penalty * self.x[:, :-1].norm(dim=1)
        rounding = NO_GRADIENT * self.second_moments.sum(dim=1).sqrt()
        return ~(self.gradient.norm(dim=1) <= torch.maximum(enough, rounding))

    def step(self, active: Tensor) -> None:
        """One L-BFGS step of the active problems; the others stay exactly where they are."""
        direction = self._direction() * active[:, None]
        along = self.problems.design @ direction
        size = self._step_size(direction, along, active)[:, None]
        step = size * direction
        self.x = self.x + step
        self.logits = self.logits + size * along
        before, self.gradient = self.gradient, self._gradient()
        self.inverse_hessian = self._inverse_hessian()
        self._remember(step, self.gradient - before)

    def _inverse_hessian(self) -> Tensor:
        """
        Inverse of the Hessian's diagonal, were p·(1 − p) the same for all rows.

        p·(1 − p) falls by orders of magnitude as rows are told apart, and with it the weight of the loss beside the
        penalty: following it takes 44 iterations where the start's diagonal takes 486 (separable rows, C = 1000).
        """
        p = self.logits.sigmoid()
        spread = torch.einsum("lnq,nq->lq", p * (1 - p), self.problems.row_weights)[:, None]
        diagonal = self.second_moments * spread
        diagonal[:, :-1] += self.problems.penalty[:, None]
        return 1 / diagonal

    def _residuals(self, logits: Tensor) -> Tensor:
        """Derivative of the mean loss by each logit, (L, n, Q)."""
        return (logits.sigmoid() - self.problems.labels[:, None]) * self.problems.row_weights

    def _gradient(self) -> Tensor:
        gradient = self.problems.design.mT @ self._residuals(self.logits)
        gradient[:, :-1] += self.problems.penalty[:, None] * self.x[:, :-1]
        return gradient

    def _direction(self) -> Tensor:
        """−H·gradient by the two-loop recursion."""
        q, shares = self.gradient, []
        for s, y, rho in reversed(self.pairs):
            share = rho * (s * q).sum(dim=1, keepdim=True)
            q = torch.addcmul(q, y, share, value=-1)
            shares.append(share)
        q = q * self.inverse_hessian * self.gamma
        for (s, y, rho), share in zip(self.pairs, reversed(shares), strict=True):
            q = torch.addcmul(q, s, share - rho * (y * q).sum(dim=1, keepdim=True))
        return -q

    def _step_size(self, direction: Tensor, along: Tensor, active: Tensor) -> Tensor:
        """(L, Q): 1, or shorter where that overshoots the minimum along the direction; 0 for problems not active."""
        downhill = -(self.gradient * direction).sum(dim=1)
        penalty, weights = self.problems.penalty, direction[:, :-1]
        linear = penalty * (self.x[:, :-1] * weights).sum(dim=1)
        quadratic = penalty * weights.square().sum(dim=1)
        size = active.to(direction.dtype)
        for _ in range(MAX_SHORTENINGS):
            residuals = self._residuals(torch.addcmul(self.logits, along, size[:, None]))
            slope = (residuals * along).sum(dim=1) + linear + size * quadratic
            too_far = active & (slope > OVERSHOOT * downhill)
            if not too_far.any():
                break
            # Where the secant through the two slopes is 0.
            share = (downhill / (downhill + slope)).clamp(0.05, 0.95)
            size = torch.where(too_far, size * share, size)
        return size

    def _remember(self, s: Tensor, y: Tensor) -> None:
        product = (s * y).sum(dim=1, keepdim=True)
        scaled = (y * y * self.inverse_hessian).sum(dim=1, keepdim=True)
        usable = product > 0
        # A problem that did not move keeps what it knows: a pair with 1/⟨s, y⟩ = 0 changes nothing.
        rho = torch.where(usable, 1 / product, 0.0)
        self.gamma = torch.where(usable & (scaled > 0), product / scaled, self.gamma)
        self.pairs = [*self.pairs, (s, y, rho)][-MEMORY:]
