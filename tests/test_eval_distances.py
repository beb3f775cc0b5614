"""Frechet distance, kernel distance, precision and recall, diversity: against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from stepdistill.data.images import DataConfig, open_data
from stepdistill.eval.diversity import mean_pairwise_distance
from stepdistill.eval.frechet import Stats, frechet_distance
from stepdistill.eval.kid import kid, mmd2
from stepdistill.eval.prdc import precision_recall
from stepdistill.run.errors import UserError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stats(mean: torch.Tensor, cov: torch.Tensor, count: int = 100) -> Stats:
    return Stats(mean, cov * (count - 1), count)


def test_frechet_of_commuting_covariances():
    """Equal eigenvectors: sum of squared differences of means and of standard deviations."""
    q, _ = torch.linalg.qr(normal(5, 5))
    m1, m2 = normal(5, seed=1), normal(5, seed=2)
    s1, s2 = normal(5, seed=3).abs(), normal(5, seed=4).abs()
    found = frechet_distance(stats(m1, q * s1.square() @ q.T), stats(m2, q * s2.square() @ q.T))
    wanted = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    assert found == pytest.approx(float(wanted), rel=1e-12)


def test_frechet_of_any_two_covariances_in_the_plane():
    """tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det AB)) for 2x2 matrices."""
    a, b = (m @ m.T for m in (normal(2, 2, seed=1), normal(2, 2, seed=2)))
    cross = (torch.trace(a @ b) + 2 * torch.det(a @ b).sqrt()).sqrt()
    wanted = torch.trace(a) + torch.trace(b) - 2 * cross
    zero = torch.zeros(2, dtype=torch.float64)
    assert frechet_distance(stats(zero, a), stats(zero, b)) == pytest.approx(float(wanted))


def test_frechet_of_equal_sets_is_zero_even_if_singular():
    few = Stats.of(normal(5, 40))  # rank 4 in 40 dimensions
    assert frechet_distance(few, few) < 1e-12
    moved = Stats(few.mean + 2, few.scatter, few.count)
    assert frechet_distance(few, moved) == pytest.approx(4 * 40)
    assert frechet_distance(few, Stats.of(normal(9, 40, seed=1))) == pytest.approx(
        frechet_distance(Stats.of(normal(9, 40, seed=1)), few)
    )


@pytest.mark.parametrize("sizes", [(1, 99), (50, 50), (7, 93)])
def test_stats_merge_exactly(sizes):
    features = normal(100, 6) * 3 + 50
    merged = Stats.of(features[: sizes[0]]).merge(Stats.of(features[sizes[0] :]))
    assert merged.count == 100
    assert torch.allclose(merged.mean, features.mean(0), rtol=1e-14)
    assert torch.allclose(merged.cov, torch.cov(features.T), rtol=1e-12)


def test_frechet_refuses_what_has_no_distance():
    good = Stats.of(normal(10, 3))
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        frechet_distance(Stats.of(normal(1, 3)), good)
    with pytest.raises(UserError, match="different width"):
        frechet_distance(Stats.of(normal(10, 4)), good)
    with pytest.raises(UserError, match="NaN or infinity"):
        Stats.of(torch.tensor([[1.0], [math.nan]]))


def test_mmd_by_hand():
    """D = 1: k(u, v) = (uv + 1)^3; x = {0, 1}, y = {1, 2}."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    within_x, within_y = 1.0, 27.0  # k(0,1), k(1,2)
    across = (1 + 1 + 8 + 27) / 4  # k(0,1), k(0,2), k(1,1), k(1,2)
    assert float(mmd2(x, y)) == pytest.approx(within_x + within_y - 2 * across)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")
def test_kid_is_torchmetrics_when_there_is_one_subset():
    class Flat(nn.Module):
        num_features = 12

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    a, b = normal(50, 3, 2, 2).float(), normal(50, 3, 2, 2, seed=1).float() + 0.3
    theirs = KernelInceptionDistance(Flat(), subsets=1, subset_size=50, normalize=True)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    ours = kid(a.flatten(1), b.flatten(1), subsets=1)
    assert ours.mean == pytest.approx(float(theirs.compute()[0]), rel=1e-4)
    assert ours.se is None


def test_kid_is_unbiased_and_its_error_honest():
    """For equal distributions the mean over trials is 0 within its error, which `se` foretells."""
    trials = [kid(normal(60, 4, seed=2 * i), normal(90, 4, seed=2 * i + 1)) for i in range(300)]
    means = torch.tensor([trial.mean for trial in trials])
    spread = float(means.std())
    assert abs(float(means.mean())) < 3 * spread / math.sqrt(len(trials))
    foretold = math.sqrt(sum(trial.se**2 for trial in trials if trial.se) / len(trials))
    assert foretold == pytest.approx(spread, rel=0.15)
    far = kid(normal(60, 4), normal(90, 4, seed=1) + 1)
    assert far.se is not None and far.mean > 3 * far.se
    assert kid(normal(60, 4), normal(90, 4, seed=1)) == kid(normal(60, 4), normal(90, 4, seed=1))


def test_kid_needs_two_images_a_subset():
    with pytest.raises(UserError, match="at least 20 images a side, not 19"):
        kid(normal(19, 4), normal(50, 4))


def test_precision_and_recall():
    reference = normal(300, 2)
    same = precision_recall(reference, reference)
    assert (same.precision, same.recall) == (1, 1)
    far = precision_recall(reference + 100, reference)
    assert (far.precision, far.recall) == (0, 0)
    narrow = precision_recall(0.1 * normal(300, 2, seed=1), reference)
    assert narrow.precision > 0.95 and narrow.recall < 0.3
    wide = precision_recall(5 * normal(300, 2, seed=1), reference)
    assert wide.precision < 0.3 and wide.recall > 0.85
    with pytest.raises(UserError, match="more than 3 images, not 3"):
        precision_recall(reference[:3], reference)


def test_precision_by_hand():
    """k = 1 on a line: balls of width 1 around 0 and 1, of width 9 around 10."""
    reference = torch.tensor([[0.0], [1.0], [10.0]])
    samples = torch.tensor([[-0.5], [-1.5], [15.0], [30.0]])
    found = precision_recall(samples, reference, k=1)
    # balls of the samples: 1 around -.5 and -1.5, 15 around 30, 15.5 around 15
    assert (found.precision, found.recall) == (0.5, 1.0)


@pytest.mark.parametrize("chunk", [2, 3, 1000])
def test_diversity_is_exact_over_all_pairs(chunk):
    images = normal(7, 1, 2, 2)
    pairs = [(images[i] - images[j]).norm() for i in range(7) for j in range(i)]
    assert mean_pairwise_distance(images, chunk=chunk) == pytest.approx(
        float(torch.stack(pairs).mean()), rel=1e-12
    )
    with pytest.raises(UserError, match="at least 2 images"):
        mean_pairwise_distance(images[:1])


def test_diversity_of_the_digits():
    digits = open_data(DataConfig())
    assert mean_pairwise_distance(digits.load(range(1797))[0]) == pytest.approx(6.0439, abs=1e-4)
