import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from src.ops.kmeans import _lloyd, cluster_means


def blobs(sizes: tuple[int, ...], spread: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows (n, 2 layers, 6) in clusters of these sizes, shuffled, and their centres (2, clusters, 6)."""
    generator = torch.Generator().manual_seed(seed)
    centres = 5 * torch.randn(2, len(sizes), 6, generator=generator)
    members = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    members = members[torch.randperm(len(members), generator=generator)]
    return centres[:, members].transpose(0, 1) + spread * torch.randn(len(members), 2, 6, generator=generator), centres


@pytest.mark.parametrize("seed", range(5))
def test_separate_clusters_are_found_largest_first(seed: int) -> None:
    rows, centres = blobs((5, 40, 12), seed=seed)
    found = cluster_means(rows, 3, seed)
    torch.testing.assert_close(found, centres[:, [1, 2, 0]].double(), atol=0.3, rtol=0)
    assert found.dtype == torch.float64
    assert torch.equal(found, cluster_means(rows, 3, seed))


def test_one_cluster_is_the_mean_and_n_clusters_are_the_rows() -> None:
    rows, _ = blobs((9,), spread=1.0)
    torch.testing.assert_close(cluster_means(rows, 1, 0)[:, 0], rows.double().mean(dim=0))
    every = cluster_means(rows, 9, 0)
    for layer in range(2):
        nearest = torch.cdist(rows[:, layer].double(), every[layer]).min(dim=1)
        assert nearest.values.max() < 1e-6 and len(nearest.indices.unique()) == 9


def test_the_inertia_is_as_low_as_scikit_learns() -> None:
    rows, _ = blobs((60, 60, 60), spread=4.0)
    means = cluster_means(rows, 4, seed=0)
    for layer in range(2):
        at_layer = rows[:, layer].double()
        ours = torch.cdist(at_layer, means[layer]).min(dim=1).values.square().sum()
        theirs = KMeans(4, n_init=10, random_state=0, tol=0).fit(at_layer.numpy()).inertia_
        assert ours <= 1.02 * theirs


def test_clusters_far_from_the_origin_are_still_told_apart() -> None:
    rows, centres = blobs((30, 20), spread=0.01)
    found = cluster_means(rows.double() + 1e6, 2, seed=0) - 1e6
    torch.testing.assert_close(found, centres.double(), atol=0.05, rtol=0)


def test_rows_that_repeat_leave_no_cluster_empty() -> None:
    rows = torch.tensor([0.0, 0, 0, 0, 1, 1, 2])[:, None, None].expand(-1, 2, 6)
    found = cluster_means(rows, 3, seed=0)
    assert torch.equal(found[..., 0], torch.tensor([[0.0, 1, 2]] * 2).double())
    with pytest.raises(ValueError, match="layer 0: 4 clusters of 3 distinct rows"):
        cluster_means(rows, 4, seed=0)


@pytest.mark.parametrize("k", [0, 8])
def test_the_number_of_clusters_is_checked(k: int) -> None:
    with pytest.raises(ValueError, match=f"{k} clusters of 7 rows"):
        cluster_means(torch.zeros(7, 2, 6), k, seed=0)


def test_a_cluster_that_loses_its_rows_takes_none_that_is_alone() -> None:
    """From this start 0 and 10 go over to their neighbours at once, and 900 leaves 1000 alone, the farthest of all."""
    rows = torch.tensor([0, 10, -8, *[-4.1] * 4, 21, 10.6, 10.6, 1000, 900, 790, 894, 894, 705, *[747] * 9])
    rows = rows.double()[:, None]
    inertia, members = _lloyd(rows, torch.tensor([0.0, -8, 21, 1000, 790, 705]).double()[:, None])
    assert (members.bincount(minlength=6) > 0).all()
    # With 1000 taken away its old cluster has no mean, and what comes after ends at 11 833.
    assert inertia < 8_000
