"""
Streaming moments of residual rows, in float64: count, mean, variance by coordinate and mean norm, layer by layer.

Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983), which works on deviations from the mean and
so keeps its digits when the mean is large beside the spread. Memory is n_layers × d_model, whatever the rows' number.
"""

import torch
from torch import Tensor

from src.ops.row_space import check_rows

MAX_ELEMENTS_AT_ONCE = 1 << 23
"""Rows are taken in groups of at most this many numbers, so that their float64 copies stay small (64 MiB)."""


class Moments:
    """Moments of the rows (n_layers, d_model) added so far. On the CPU, whatever device the rows are on."""

    def __init__(self, n_layers: int, d_model: int) -> None:
        """Raises ValueError unless both are at least 1."""
        if n_layers < 1 or d_model < 1:
            raise ValueError(f"moments of {n_layers} layers of width {d_model}: both must be at least 1")
        self.n_layers, self.d_model = n_layers, d_model
        self.count = 0
        """Rows added."""
        self.sum_of_norms = torch.zeros(n_layers, dtype=torch.float64)
        """Σ ‖row‖ by layer, float64 (n_layers,)."""
        self._mean = torch.zeros(n_layers, d_model, dtype=torch.float64)
        self._squared_deviations = torch.zeros(n_layers, d_model, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """
        Take in `rows` (n, n_layers, d_model), any float dtype and device; n may be 0.

        Raises ValueError for another shape or dtype, and for NaN or infinity (the layer is named); then nothing of
        `rows` has been added.
        """
        check_rows(rows, "rows")
        if tuple(rows.shape[1:]) != (self.n_layers, self.d_model):
            raise ValueError(f"rows are {tuple(rows.shape)}; expected (n, {self.n_layers}, {self.d_model})")
        for part in rows.split(max(1, MAX_ELEMENTS_AT_ONCE // (self.n_layers * self.d_model))):
            if len(part):
                self._add(part.cpu().double())

    def _add(self, part: Tensor) -> None:
        mean = part.mean(dim=0)
        self.sum_of_norms += part.norm(dim=-1).sum(dim=0)
        self._merge(len(part), mean, (part - mean).square().sum(dim=0))

    def _merge(self, count: int, mean: Tensor, squared_deviations: Tensor) -> None:
        total = self.count + count
        if not total:
            return
        shift = mean - self._mean
        self._mean = self._mean + shift * (count / total)
        self._squared_deviations = (
            self._squared_deviations + squared_deviations + shift.square() * (self.count * count / total)
        )
        self.count = total

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together. Raises ValueError when the shapes differ."""
        if not isinstance(other, Moments):
            return NotImplemented
        if (self.n_layers, self.d_model) != (other.n_layers, other.d_model):
            raise ValueError(
                f"moments of {self.n_layers} layers of width {self.d_model} and of {other.n_layers} of width "
                f"{other.d_model} cannot be merged"
            )
        both = Moments(self.n_layers, self.d_model)
        for each in (self, other):
            both._merge(each.count, each._mean, each._squared_deviations)
            both.sum_of_norms = both.sum_of_norms + each.sum_of_norms
        return both

    @property
    def mean(self) -> Tensor:
        """Float64 (n_layers, d_model). Raises ValueError when there are no rows."""
        self._require(1, "a mean")
        return self._mean.clone()

    @property
    def variance(self) -> Tensor:
        """Sample variance (n − 1) of every coordinate, float64 (n_layers, d_model). ValueError below two rows."""
        self._require(2, "a variance")
        return self._squared_deviations / (self.count - 1)

    @property
    def mean_norm(self) -> Tensor:
        """Mean ‖row‖ by layer, float64 (n_layers,). Raises ValueError when there are no rows."""
        self._require(1, "a mean norm")
        return self.sum_of_norms / self.count

    def _require(self, n: int, what: str) -> None:
        if self.count < n:
            raise ValueError(f"{what} needs at least {n} rows, there are {self.count}")
