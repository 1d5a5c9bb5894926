"""Quality of samples, outliers and chains: every function against brute force, closed forms and laws known exactly.

Statistical tests use fixed generators; each states its false-alarm rate over generators, and ledger.py adds them up.
"""

import math
import subprocess
import sys
import zlib

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from ebm_lit.energy import EnergyCNN
from ebm_lit.evaluation import (
    auroc,
    chain_diagnostics,
    compressed_size,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    outlier_table,
    outliers,
    photo_patches,
    polynomial_kernel,
    precision_recall,
    real_floor,
    simple_scores,
    to_arviz,
)
from ebm_lit.langevin import MALA, Langevin


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    gap, a, b = x.mean(0) - y.mean(0), np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    return float(gap @ gap + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real))


# The Fréchet distance


def test_frechet_distance_by_hand(device):
    x, y = torch.tensor([[-1.0], [1.0]], device=device), torch.tensor([[1.0], [5.0]], device=device)
    assert frechet_distance(x, y) == pytest.approx(11, abs=1e-12)  # 3² + (√2 − √8)²


@pytest.mark.parametrize(("n", "m", "d"), [(50, 80, 1), (50, 80, 7), (300, 200, 40)])
def test_frechet_distance_is_that_of_the_matrix_square_root(make_generator, n, m, d):
    g = make_generator(n + d)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    y = torch.randn(m, d, generator=g, dtype=torch.float64) + 1
    assert frechet_distance(x, y) == pytest.approx(by_sqrtm(x.numpy(), y.numpy()), rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-12)


def test_frechet_distance_of_singular_covariances(make_generator):
    """Fewer examples than features, and constant ones: exact where the closed form is known."""
    x = torch.randn(10, 64, generator=make_generator(0), dtype=torch.float64)
    x[:, :20] = 0.5
    shift = torch.linspace(0, 1, 64, dtype=torch.float64)
    assert frechet_distance(x, x) < 1e-9
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)
    scaled = (x - x.mean(0)) * 3 + x.mean(0)  # Σ₂ = 9Σ₁: tr Σ₁ (1 + 9 − 2·3)
    assert frechet_distance(x, scaled) == pytest.approx(4 * float(x.var(0).sum()), rel=1e-9)
    a, b = torch.zeros(5, 4), torch.zeros(5, 4)
    a[:, 0], b[:, 1] = torch.arange(5.0), torch.arange(5.0)  # orthogonal supports share nothing
    assert frechet_distance(a, b) == pytest.approx(2 * 2.5 + 2 * 4)  # both variances; means 2 apart on two axes


def test_frechet_distance_is_invariant_to_rotations_and_offsets(make_generator):
    g = make_generator(1)
    x, y = torch.randn(100, 6, generator=g).double(), 2 * torch.randn(90, 6, generator=g).double()
    q = torch.linalg.qr(torch.randn(6, 6, generator=g).double()).Q
    assert frechet_distance(x @ q + 1e4, y @ q + 1e4) == pytest.approx(frechet_distance(x, y), rel=1e-7)
    rows = torch.randperm(100, generator=g)
    assert frechet_distance(x[rows], y) == pytest.approx(frechet_distance(x, y), rel=1e-10)


# The kernel distance


def brute_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    n, m = len(x), len(y)
    kxx, kyy, kxy = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    within_x = sum(kxx[i, j].item() for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kyy[i, j].item() for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * kxy.mean().item()


def test_kernel_distance_is_the_double_sum_over_different_examples(make_generator):
    g = make_generator(2)
    x, y = torch.randn(9, 4, generator=g).double(), torch.randn(14, 4, generator=g).double() + 0.3
    assert kernel_distance(x, y).value == pytest.approx(brute_mmd(x, y), rel=1e-10)
    assert kernel_distance(x, y).p_value is None
    assert kernel_distance(torch.ones(2, 1), torch.zeros(2, 1)).value == 7


def test_kernel_distance_in_slices(make_generator):
    """More rows than one slice of 1,024 holds."""
    g = make_generator(3)
    x, y = torch.randn(900, 3, generator=g).double(), torch.randn(700, 3, generator=g).double()
    kxx, kyy, kxy = (polynomial_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
    within = (kxx.sum() - kxx.trace()) / (900 * 899) + (kyy.sum() - kyy.trace()) / (700 * 699)
    assert kernel_distance(x, y).value == pytest.approx(float(within - 2 * kxy.mean()), abs=1e-9)


def test_kernel_distance_is_unbiased_and_its_p_value_uniform(make_generator):
    """600 comparisons of a law with itself. False alarms: 4e-7 for the mean, 2e-6 for the p-values.

    With 19 permutations p takes the values 1/20, …, 20/20 with equal chances: a χ² test with 19 degrees of freedom.
    """
    g = make_generator(4)
    found = [kernel_distance(*torch.randn(2, 12, 3, generator=g), 19, g) for _ in range(600)]
    values = torch.tensor([f.value for f in found])
    assert abs(values.mean()) < 5.5 * values.std() / math.sqrt(600)
    p = torch.tensor([f.p_value for f in found])
    counts = torch.bincount((p * 20).round().long(), minlength=21)
    assert counts[0] == 0 and counts.sum() == 600
    assert scipy.stats.chisquare(counts[1:].numpy()).pvalue > 1e-6


def test_kernel_test_has_power(make_generator, device):
    """Means 0, variances 1, third moments 0 and 1.5; p at its minimum. Missed once in 1e7.

    The distance is 2.2 ± 0.4, its root 1.5 ± 0.14; shuffled labels give 0 ± 0.05, one of a hundred above 0.25.
    """
    g = make_generator(5, device)
    flat = math.sqrt(3) * (2 * torch.rand(800, 1, generator=g, device=device) - 1)
    skewed = torch.where(torch.rand(800, 1, generator=g, device=device) < 0.8, -0.5, 2.0)
    assert kernel_distance(flat, skewed, 99, g).p_value == 0.01
    again = [kernel_distance(flat, skewed, 99, make_generator(6, device)) for _ in range(2)]
    assert again[0] == again[1]


# Precision and recall


def test_precision_and_recall_by_hand(device):
    x = torch.tensor([[0.5], [10.0]], device=device)
    y = torch.tensor([[0.0], [1.0], [2.0], [3.0]], device=device)
    assert precision_recall(x, y, k=1) == (0.5, 1.0)
    assert precision_recall(y, x, k=1) == (1.0, 0.5)


def test_precision_and_recall_at_their_ends(make_generator):
    x = torch.randn(300, 5, generator=make_generator(7))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x + 100, x) == (0, 0)
    two = torch.cat([x[:150], x[150:] + 100])
    dropped = precision_recall(x[:150].roll(1, 0) + 1e-4, two)
    assert dropped.precision == 1 and dropped.recall == 0.5
    invented = precision_recall(two, x[:150] + 1e-4)
    assert invented.precision == 0.5 and invented.recall == 1


@pytest.mark.parametrize(("copies", "collapses"), [(1, False), (3, False), (4, True)])
def test_recall_sees_copies_as_soon_as_the_kth_neighbour_is_one(make_generator, copies, collapses):
    g = make_generator(8)
    real, few = torch.randn(200, 2, generator=g), torch.randn(50, 2, generator=g)
    found = precision_recall(few.repeat(copies, 1), real, k=3)
    assert found.precision > 0.8 and (found.recall == 0) == collapses


def test_precision_and_recall_in_slices(make_generator):
    g = make_generator(9)
    x, y = torch.randn(1100, 2, generator=g).double(), 1.5 * torch.randn(1300, 2, generator=g).double()
    dyy, dxy = torch.cdist(y, y), torch.cdist(x, y)
    inside = (dxy <= dyy.sort(1).values[:, 3]).any(1).double().mean().item()
    assert precision_recall(x, y).precision == pytest.approx(inside, abs=2e-3)  # cdist rounds at the edge of a ball


def test_nearest_distance(make_generator, device):
    x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=device), torch.tensor([[0.0, 0.0], [0.0, 1.0]], device=device)
    assert nearest_distance(x, y).tolist() == pytest.approx([0, math.sqrt(18)])
    assert nearest_distance(x, y, 2).tolist() == pytest.approx([1, 5])
    rows = torch.randn(1500, 3, generator=make_generator(10))
    assert (nearest_distance(rows, rows) == 0).all()  # exactly


def test_real_floor_compares_disjoint_sets(make_generator, device):
    features = torch.arange(20.0, device=device)[:, None]
    seen = []

    def metric(x, y):
        seen.append((set(x.flatten().tolist()), set(y.flatten().tolist())))
        return float(len(seen))

    assert real_floor(metric, features, 8, 4, make_generator(11, device)).tolist() == [1, 2, 3, 4]
    assert all(len(a) == len(b) == 8 and not a & b for a, b in seen) and len({frozenset(a) for a, _ in seen}) > 1


# Outliers


def test_auroc_counts_pairs(make_generator):
    inside, outside = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])
    assert auroc(inside, outside) == 0.75 and auroc(outside, inside) == 0.25
    assert auroc(torch.ones(3), torch.ones(4)) == 0.5
    assert auroc(torch.tensor([0.0, -math.inf]), torch.tensor([math.inf, 1.0])) == 1
    g = make_generator(12)
    a, b = torch.randint(0, 5, (40,), generator=g).float(), torch.randint(1, 7, (30,), generator=g).float()
    pairs = (b[None] > a[:, None]).double() + (b[None] == a[:, None]).double() / 2
    assert auroc(a, b) == pytest.approx(pairs.mean().item())


@pytest.mark.parametrize("channels", [1, 3])
def test_outliers_are_what_their_names_say(make_generator, device, channels):
    g = make_generator(13, device)
    x = 2 * torch.rand(6, channels, 8, 10, generator=g, device=device) - 1
    before = x.clone()
    found = outliers(x, g)
    assert torch.equal(x, before)
    assert all(v.shape == x.shape and v.abs().max() <= 1 and v.device == x.device for v in found.values())
    shuffled = found["shuffled pixels"]
    assert torch.equal(shuffled.flatten(2).sort().values, x.flatten(2).sort().values) and not torch.equal(shuffled, x)
    colours = x.flatten(2).transpose(1, 2)[0].tolist()  # the channels of a pixel stay together
    assert all(pixel in colours for pixel in shuffled.flatten(2).transpose(1, 2)[0].tolist())
    assert torch.equal(found["inverted"], -x) and (found["black"] == -1).all()
    assert (found["constant grey"].flatten(1).std(1) < 1e-6).all()
    assert torch.equal(found["shifted"].roll(-2, -1), x)
    again = outliers(x, make_generator(14, device)), outliers(x, make_generator(14, device))
    assert all(torch.equal(again[0][k], again[1][k]) for k in found)


def test_photo_patches(make_generator):
    grey, colour = photo_patches(20, (1, 8, 12), make_generator(15)), photo_patches(4, (3, 32, 32), make_generator(15))
    assert grey.shape == (20, 1, 8, 12) and colour.shape == (4, 3, 32, 32)
    assert grey.dtype == torch.float32 and min(grey.min(), colour.min()) >= -1 and max(grey.max(), colour.max()) <= 1
    assert torch.equal(grey, photo_patches(20, (1, 8, 12), make_generator(15)))
    assert grey.flatten(1).unique(dim=0).shape[0] > 10


def test_simple_scores(device):
    x = torch.full((3, 1, 8, 8), -1.0, device=device)
    x[1, 0, 0, 0] = 1.0
    x[2] = 1.0
    sizes = [len(zlib.compress(bytes(p.flatten().tolist()), 9)) for p in ((x + 1) * 127.5).to(torch.uint8)]
    assert compressed_size(x).tolist() == sizes
    train = torch.stack([x[0], x[2]])
    found = simple_scores(x, train)  # means −1 and 1: centre 0
    assert found["mean pixel"].tolist() == pytest.approx([1, 62 / 64, 1], rel=1e-5)
    with pytest.raises(ValueError, match="x_train"):
        simple_scores(x, train[:0])


def test_outlier_table_leaves_no_trace(make_generator):
    g = make_generator(16)
    net = EnergyCNN((1, 8, 8), 4, 8, generator=g)
    x = torch.rand(12, 1, 8, 8, generator=g)
    table = outlier_table(net, x, x[:6], outliers(x[6:], g))
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert table["black"].keys() == {"energy", "mean pixel", "compressed size"}
    assert all(0 <= value <= 1 for row in table.values() for value in row.values())
    with torch.no_grad():
        expected = auroc(net(x[:6]), net(-x[6:]))
    assert table["inverted"]["energy"] == expected


# Chains


def spring(x):
    return x.square().flatten(1).sum(1) / 2


def test_independent_draws_are_worth_themselves(make_generator):
    """R̂ within 0.01 of 1 and ESS within 25 % of 8,000: false alarm 1e-8.

    Over 180 columns R̂ scatters by 0.0003, ESS by 3 % around 98.5 %, tail ESS by 250 around 7,800, MCSE by 2 % and the
    largest of the autocorrelations by 0.004 around 0.034: every limit is more than six standard deviations away.
    """
    found = chain_diagnostics(torch.randn(2000, 4, 3, generator=make_generator(17)))
    assert found.n_chains == 4 and found.n_draws == 2000
    assert (found.split_rhat < 1.01).all() and (found.split_rhat > 0.99).all()
    assert ((found.ess_bulk / 8000 - 1).abs() < 0.25).all() and (found.ess_tail > 5000).all()
    assert torch.allclose(found.mcse_mean, torch.full((3,), 8000**-0.5, dtype=torch.float64), rtol=0.2)
    assert (found.autocorrelation[0] == 1).all() and (found.autocorrelation[1:].abs() < 0.08).all()


def test_memory_of_a_langevin_chain_on_a_spring(make_generator):
    """Exact: autocorrelation aᵏ, N(1 − a)/(1 + a) effective draws. False alarm: 1e-8.

    Over 60 runs ESS scatters by 4.6 % around 101 % of that, and the largest error of an autocorrelation
    is 0.018 ± 0.009.
    """
    g = make_generator(18)
    start = torch.randn(8, 1, generator=g)
    chain = Langevin(0.2, n_steps=4000).run(spring, start, generator=g, trajectory=4001)
    found = chain_diagnostics(chain, max_lag=20)
    assert float(found.ess_bulk) == pytest.approx(8 * 4001 * 0.2 / 1.8, rel=0.3)
    assert found.autocorrelation.shape == (21, 1)
    assert (found.autocorrelation[:, 0] - 0.8 ** torch.arange(21)).abs().max() < 0.15


def test_rhat_catches_stuck_chains_and_is_fooled_by_chains_from_one_place(make_generator):
    noise = 0.1 * torch.randn(500, 4, 1, generator=make_generator(19))
    apart = noise + torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None]
    assert chain_diagnostics(apart).split_rhat > 1.5 and chain_diagnostics(apart).ess_bulk < 20
    assert chain_diagnostics(noise - 1).split_rhat < 1.02


def test_trajectories_of_all_kinds(make_generator):
    x = torch.randn(50, 3, 1, 2, 2, generator=make_generator(20))
    x[:, :, 0, 0, 0] = 0.25
    found = chain_diagnostics(x, skip=10)
    assert found.n_draws == 40 and found.split_rhat.shape == (4,)
    assert found.split_rhat[0].isnan() and found.autocorrelation[:, 0].isnan().all()
    assert torch.isfinite(found.split_rhat[1:]).all() and found.split_rhat.dtype == torch.float64
    assert chain_diagnostics(x[..., 0, 0, 1]).ess_bulk.shape == (1,)
    assert all(chain_diagnostics(torch.zeros(10, 2, 3)).ess_bulk.isnan())
    mala = MALA(0.5, 60).run(spring, torch.randn(3, 2, generator=make_generator(21)), trajectory=61)
    assert chain_diagnostics(mala).n_draws == 61
    posterior = to_arviz(mala, skip=1, name="v").posterior["v"]
    assert posterior.dims[:2] == ("chain", "draw") and posterior.shape == (3, 60, 2)
    assert np.array_equal(posterior.values[1, 4], mala.trajectory[5, 1].double().numpy())


@pytest.mark.filterwarnings("error")
def test_few_draws_of_many_chains_give_no_warning(make_generator):
    assert chain_diagnostics(torch.randn(5, 20, 1, generator=make_generator(22))).n_chains == 20


def test_arviz_is_imported_late_and_quietly():
    code = "import sys, torch; from ebm_lit.evaluation import chain_diagnostics; assert 'arviz' not in sys.modules; "
    code += "chain_diagnostics(torch.randn(50, 2, 1)); assert 'arviz' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr


# Mistakes

ONE = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: frechet_distance(ONE, ONE[:1]), "y_features must have at least 2 rows, got 1"),
        (lambda: frechet_distance(ONE.long(), ONE), "x_features must be a floating-point tensor"),
        (lambda: frechet_distance(ONE[0], ONE), "x_features must be a floating-point tensor"),
        (lambda: frechet_distance(ONE, torch.zeros(5, 3)), "equally many columns, got 2 and 3"),
        (lambda: frechet_distance(ONE / 0, ONE), "x_features must be finite"),
        (lambda: kernel_distance(ONE, ONE, -1), "n_permutations must be a whole number >= 0, got -1"),
        (lambda: kernel_distance(ONE, ONE[:1]), "y_features must have at least 2 rows"),
        (lambda: precision_recall(ONE, ONE, 0), "k must be a whole number >= 1, got 0"),
        (lambda: precision_recall(ONE, ONE, 5), "x_features must have at least 6 rows, got 5"),
        (lambda: nearest_distance(ONE, ONE, 6), "k must be from 1 to 5"),
        (lambda: real_floor(frechet_distance, ONE, 3), "n must be from 1 to 2, half of the real examples, got 3"),
        (lambda: real_floor(frechet_distance, ONE, 2, 0), "n_splits must be"),
        (lambda: auroc(ONE, ONE[:, 0]), "inside must be"),
        (lambda: auroc(ONE[:, 0], ONE[:0, 0]), "outside must be"),
        (lambda: auroc(ONE[:, 0], ONE[:, 0] / 0), "outside must be"),
        (lambda: photo_patches(3, (2, 8, 8)), "shape must be"),
        (lambda: photo_patches(3, (1, 8, 900)), "shape must be"),
        (lambda: chain_diagnostics(torch.zeros(20, 1, 2)), "at least 2 chains, got 1"),
        (lambda: chain_diagnostics(torch.zeros(20, 2, 2), skip=17), "leaves at least 4 draws of 20, got 17"),
        (lambda: chain_diagnostics(torch.full((20, 2, 2), math.nan)), "trajectory must be finite"),
        (lambda: chain_diagnostics(Langevin(0.1, 3).run(spring, torch.zeros(2, 1))), "trajectory must be a tensor"),
        (lambda: to_arviz([1, 2]), "trajectory must be a tensor"),
    ],
)
def test_mistakes_are_one_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
