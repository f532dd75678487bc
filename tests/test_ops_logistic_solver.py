import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from src.ops.logistic_solver import Problems, solve


def problems(n: int = 40, width: int = 6, n_layers: int = 3, separable: bool = False) -> Problems:
    """Four problems on each layer: two sets of rows × two penalties."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(n) % 3 == 0).double()
    rows = torch.randn(n_layers, n, width, generator=generator, dtype=torch.float64)
    rows[:, :, 0] += (10.0 if separable else 1.0) * labels
    design = torch.cat([rows, torch.ones(n_layers, n, 1, dtype=torch.float64)], dim=-1)
    taken = torch.ones(n, 2, dtype=torch.float64)
    taken[:10, 1] = 0
    row_weights = (taken / taken.sum(dim=0)).repeat_interleave(2, dim=1)
    penalty = torch.tensor([1e-1, 1e-4, 1e-1, 1e-4], dtype=torch.float64).repeat(n_layers, 1)
    return Problems(design, labels, row_weights, penalty)


def objective(x: np.ndarray, design: Tensor, labels: Tensor, weights: Tensor, penalty: Tensor) -> float:
    logits = design @ torch.from_numpy(x)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return float((weights * losses).sum() + penalty / 2 * torch.from_numpy(x[:-1]).square().sum())


@pytest.mark.parametrize("separable", [False, True])
def test_every_solution_is_the_optimum_of_its_own_problem(separable: bool) -> None:
    all_of_them = problems(separable=separable)
    solution, _ = solve(all_of_them, tolerance=1e-6)
    assert solution.isfinite().all()
    for layer in range(3):
        for q in range(4):
            one = (all_of_them.design[layer], all_of_them.labels, all_of_them.row_weights[:, q])
            arguments = (*one, all_of_them.penalty[layer, q])
            found = solution[layer, :, q].numpy()
            reference = minimize(objective, found * 0, arguments, method="BFGS", options={"gtol": 1e-7}).x
            assert objective(found, *arguments) <= objective(reference, *arguments) + 1e-12
            assert np.linalg.norm(found[:-1] - reference[:-1]) <= 2e-3 * np.linalg.norm(reference[:-1])


def test_the_tolerance_bounds_the_error_of_the_weights() -> None:
    exact, n_exact = solve(problems(), tolerance=1e-9)
    for tolerance in (1e-1, 1e-2, 1e-4):
        found, n_iterations = solve(problems(), tolerance)
        error = (found - exact)[:, :-1].norm(dim=1) / exact[:, :-1].norm(dim=1)
        assert error.max() <= 1.2 * tolerance
        assert n_iterations <= n_exact


def test_a_problem_does_not_depend_on_those_solved_beside_it() -> None:
    whole = problems()
    together, _ = solve(whole, tolerance=1e-8)
    for q in range(4):
        alone = Problems(
            whole.design[1:2], whole.labels, whole.row_weights[:, q : q + 1], whole.penalty[1:2, q : q + 1]
        )
        torch.testing.assert_close(solve(alone, tolerance=1e-8)[0][0, :, 0], together[1, :, q], rtol=1e-5, atol=1e-6)


def test_rows_that_a_problem_leaves_out_do_not_reach_it() -> None:
    whole = problems()
    spoilt = whole.design.clone()
    spoilt[:, :10] *= -50
    torch.testing.assert_close(
        solve(whole._replace(design=spoilt), 1e-8)[0][..., 2:], solve(whole, 1e-8)[0][..., 2:], rtol=1e-5, atol=1e-6
    )


def test_classes_that_are_not_told_apart_have_no_weights() -> None:
    whole = problems()
    flat = torch.zeros_like(whole.design)
    flat[..., -1] = 1
    solution, _ = solve(whole._replace(design=flat))
    assert (solution[:, :-1] == 0).all()
    share = (whole.row_weights * whole.labels[:, None]).sum(dim=0)
    torch.testing.assert_close(solution[0, -1].sigmoid(), share)


def test_no_convergence_is_an_error_that_names_the_first_problem() -> None:
    message = r"12 logistic regressions have not converged after 1 iterations, the first at layer 7 with C · rows = 10;"
    with pytest.raises(RuntimeError, match=message):
        solve(problems(), tolerance=1e-12, max_iterations=1, first_layer=7)
