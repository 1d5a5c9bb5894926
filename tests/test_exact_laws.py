"""Chains against laws that are not Gaussian, and contrastive divergence against the exact gradient of the likelihood.

test_langevin.py holds the sampler to its law on a spring. Here its kernel is iterated by quadrature, so that the law of
a finite chain from a fixed start is known on any energy of the line, with clipping and clamping, and on correlated
Gaussians. Gradients are compared with quadrature and with an RBM whose hidden states are listed. False alarms are
registered in ledger.py.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from ebm_lit.boltzmann import boltzmann_probs, double_well, make_grid, quadratic
from ebm_lit.contrastive_divergence import cd_loss, negatives_from_data, negatives_from_noise
from ebm_lit.energy import EnergyMLP, energy_and_grad
from ebm_lit.evaluation import GaussianBernoulliRBM
from ebm_lit.langevin import MALA, Langevin, noise_scale_for, uniform_init

Factory = Callable[..., torch.Generator]
Z_LIMIT = 5.7  # of a normal number: two-sided 1.2e-8


# ULA: a finite chain from a fixed start


def well(x: Tensor) -> Tensor:
    return double_well(x, barrier=1.0, tilt=0.3)


CELLS, SIDE = 2000, 6.0  # cells of 0.006, a tenth and less of the noise of one step


def law_of_chain(sampler: Langevin, start: float, n_steps: int) -> Tensor:
    """Probabilities of the cells of [−6, 6] after `n_steps`, the kernel iterated; walls are cells of their own."""
    edges = torch.linspace(-SIDE, SIDE, CELLS + 1, dtype=torch.float64)
    if sampler.bounds is not None:
        edges = torch.linspace(*sampler.bounds, CELLS + 1, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    states = centres if sampler.bounds is None else torch.cat([edges[:1], centres, edges[-1:]])

    def kernel(x: Tensor) -> Tensor:
        goal = x - sampler.step_size * sampler.clip(energy_and_grad(well, x[:, None])[1][:, 0])
        below = torch.special.ndtr((edges - goal[:, None]) / sampler.sigma)
        inner = below.diff(dim=1)
        return inner if sampler.bounds is None else torch.cat([below[:, :1], inner, 1 - below[:, -1:]], 1)

    p = kernel(torch.tensor([start], dtype=torch.float64))[0]
    matrix = kernel(states)
    for _ in range(n_steps - 1):
        p = p @ matrix
    return p


def cell_of(x: Tensor, sampler: Langevin) -> Tensor:
    """The number of a state's cell in `law_of_chain`."""
    low, high = sampler.bounds or (-SIDE, SIDE)
    cell = ((x - low) / (high - low) * CELLS).floor().long().clamp(0, CELLS - 1)
    if sampler.bounds is None:
        return cell
    return torch.where(x <= low, 0, torch.where(x >= high, CELLS + 1, cell + 1))


def chi_square(x: Tensor, p: Tensor, sampler: Langevin) -> float:
    """p-value of the states given the law: cells pooled to about forty of at least 1 % each, walls kept apart."""
    walls = sampler.bounds is not None
    inner = p[1:-1] if walls else p
    group = (inner.cumsum(0) * 40).long().clamp(max=39)
    group = torch.cat([torch.tensor([40]), group, torch.tensor([41])]) if walls else group
    expected = torch.zeros(42, dtype=torch.float64).index_add(0, group, p) * len(x)
    counts = torch.bincount(group[cell_of(x.flatten(), sampler)], minlength=42).double()
    common = expected >= 20
    assert expected[~common].sum() < 20 and common.sum() >= 20
    statistic = ((counts - expected).square() / expected)[common].sum().item()
    return float(stats.chi2.sf(statistic, int(common.sum()) - 1))


CHAINS = {
    "from a hill": (Langevin(0.02, temperature=0.5), 0.1, (1, 4, 40)),
    "from far": (Langevin(0.03, temperature=1.0), 2.0, (2, 10, 100)),
    "clipped": (Langevin(0.05, temperature=0.5, grad_clip=2.0), -1.9, (3, 6, 60)),
    "clamped": (Langevin(0.03, temperature=0.7, bounds=(-1.2, 1.0)), 0.9, (2, 8, 50)),
}
N_WELL = 40_000


@pytest.mark.parametrize("name", CHAINS)
def test_ula_on_the_double_well_has_the_law_of_its_kernel(name: str, make_generator: Factory) -> None:
    """False alarm: 2e-6, twelve chi-square tests at 1.5e-7, each with about forty cells. Power: the next test."""
    sampler, start, lengths = CHAINS[name]
    for n in lengths:
        x = torch.full((N_WELL, 1), start, dtype=torch.float64)
        x = sampler.sample(well, x, n_steps=n, generator=make_generator(n))
        p = law_of_chain(sampler, start, n)
        assert p.sum().item() == pytest.approx(1, abs=5e-6), "the box holds all but a fifth of one chain"
        assert chi_square(x, p, sampler) > 1.5e-7, n


@pytest.mark.parametrize("name", CHAINS)
def test_power_other_kernels_are_rejected(name: str, make_generator: Factory) -> None:
    """A step more or less, five per cent of noise, no clip, no walls: every one of them by far (missed below 1e-9)."""
    sampler, start, (_, n, _) = CHAINS[name]
    x = torch.full((N_WELL, 1), start, dtype=torch.float64)
    x = sampler.sample(well, x, n_steps=n, generator=make_generator(n))
    eta, sigma = sampler.step_size, sampler.sigma
    wrong = [
        law_of_chain(sampler, start, n - 1),
        law_of_chain(
            Langevin(eta, noise_scale=1.05 * sigma, grad_clip=sampler.grad_clip, bounds=sampler.bounds), start, n
        ),
    ]
    if sampler.grad_clip is not None:
        wrong.append(law_of_chain(Langevin(eta, noise_scale=sigma), start, n))
    for law in wrong:
        assert chi_square(x, law.clamp_min(1e-300) / law.sum(), sampler) < 1e-9


def test_ula_on_a_correlated_gaussian_from_a_fixed_start(make_generator: Factory) -> None:
    """Mean and covariance after n steps: m ← Am, C ← ACAᵀ + 2ηT with A = 1 − ηP, for a precision P with correlations.

    False alarm: 5e-7, 36 comparisons at 1.2e-8. Power: 40,000 chains see 0.03 standard deviations and 4 % of a
    variance; a gradient that is diagonal only, or noise shared between the coordinates, is off ten times that.
    """
    p = torch.tensor([[2.0, 0.9, 0.0], [0.9, 1.0, -0.4], [0.0, -0.4, 0.7]], dtype=torch.float64)
    eta, temperature, n_chains = 0.3, 0.8, 40_000
    first = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    a, eye = torch.eye(3, dtype=torch.float64) - eta * p, torch.eye(3, dtype=torch.float64)
    for n in (1, 3, 15):
        mean, cov = first, torch.zeros(3, 3, dtype=torch.float64)
        for _ in range(n):
            mean, cov = a @ mean, a @ cov @ a.T + 2 * eta * temperature * eye
        sampler = Langevin(eta, n, temperature=temperature)
        x = sampler.sample(lambda x: ((x @ p) * x).sum(1) / 2, first.repeat(n_chains, 1), generator=make_generator(n))
        z_mean = (x.mean(0) - mean) / (cov.diag() / n_chains).sqrt()
        centred = x - mean
        spread = (cov.square() + cov.diag()[:, None] * cov.diag()) / n_chains  # variance of a sample covariance
        z_cov = ((centred.T @ centred) / n_chains - cov) / spread.sqrt()
        assert max(z_mean.abs().max(), z_cov.abs().max()) < Z_LIMIT


def test_ula_remembers_as_its_kernel_says(make_generator: Factory) -> None:
    """Stationary on a spring, states k steps apart have the correlation (1 − η)^k; six lags, false alarm 1e-7.

    Power: 50,000 pairs see 0.03; noise drawn once and used again, or one step too many, is off by 0.1 and more.
    """
    eta, n = 0.2, 50_000
    v = 1 / (1 - eta / 2)
    x = math.sqrt(v) * torch.randn(n, 1, generator=make_generator(1), dtype=torch.float64)
    film = Langevin(eta, 8).run(quadratic, x, generator=make_generator(2), trajectory=9).trajectory
    assert film is not None
    for k in (1, 2, 3, 4, 6, 8):
        rho = (1 - eta) ** k
        found = (film[0] * film[k]).mean().item() / v
        assert abs(found - rho) < Z_LIMIT * math.sqrt((1 + rho**2) / n)


# The exact gradient of the likelihood


def gradient(energy: nn.Module, loss: Tensor) -> Tensor:
    """The gradient of a scalar with respect to all parameters, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(energy.parameters()))])


def agreement(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Cosine, and the relative error ‖found − exact‖/‖exact‖."""
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0).item()
    return cosine, ((found - exact).norm() / exact.norm()).item()


def rough_network(dim: int, g: torch.Generator) -> EnergyMLP:
    """A small network with hills and hollows."""
    energy = EnergyMLP(dim, 12, 2, confine=1.5, generator=g).double()
    with torch.no_grad():
        for p in energy.parameters():
            p.mul_(2.0)
    return energy


def by_quadrature(energy: nn.Module, x_data: Tensor, dim: int) -> Tensor:
    points = make_grid([(-9.0, 9.0)] * dim, 2000 if dim == 1 else 200).points
    weights = boltzmann_probs(energy(points)).detach()
    return gradient(energy, energy(x_data).mean()) - gradient(energy, (weights * energy(points)).sum())


def spread_out(dim: int) -> Callable[[int, torch.Generator | None], Tensor]:
    return lambda n, g: uniform_init(n, (dim,), (-3.0, 3.0), g).double()


NETWORKS = {dim: rough_network(dim, torch.Generator().manual_seed(3)) for dim in (1, 2)}  # the same with any seed


@pytest.mark.parametrize("dim", [1, 2])
def test_long_chains_give_the_exact_gradient_of_a_network(dim: int, make_generator: Factory) -> None:
    """Cosine ≥ 0.99 and relative error ≤ 5 %: MALA with large steps from noise, and ULA with small ones from there on.

    False alarm: 1e-6. 50,000 negatives leave a root mean square error of 0.9 % in two dimensions and 0.5 % in one; 5 %
    is five times that, ULA's bias (half a per cent) included, and no sum of squares has a heavier tail than one.
    Power: CD-1 is off by more than 50 %.
    """
    energy, n = NETWORKS[dim], 50_000
    x_data = 0.4 * torch.randn(5000, dim, generator=make_generator(4), dtype=torch.float64) + 1.2
    exact = by_quadrature(energy, x_data, dim)
    start = spread_out(dim)(n, make_generator(5))
    by_mala = MALA(0.6, 60).sample(energy, start, generator=make_generator(7))
    by_ula = negatives_from_noise(Langevin(0.02, 60), energy, n, lambda n, g: by_mala, make_generator(6))
    negatives = {"MALA": by_mala, "ULA": by_ula}
    for name, x_neg in negatives.items():
        cosine, error = agreement(gradient(energy, cd_loss(energy(x_data), energy(x_neg)).loss), exact)
        assert cosine >= 0.99 and error <= 0.05, f"{name}: cosine {cosine:.4f}, relative error {error:.3f}"
    one = negatives_from_data(Langevin(0.02, 1), energy, x_data, make_generator(8))
    assert agreement(gradient(energy, cd_loss(energy(x_data), energy(one)).loss), exact)[1] > 0.5


def small_rbm(g: torch.Generator) -> GaussianBernoulliRBM:
    weights = 0.7 * torch.randn(4, 5, generator=g, dtype=torch.float64)
    bias = 0.3 * torch.randn(4, generator=g, dtype=torch.float64)
    return GaussianBernoulliRBM(weights, bias, torch.zeros(5, dtype=torch.float64), scale=0.8)


RBM, OTHER_RBM = (small_rbm(torch.Generator().manual_seed(seed)) for seed in (9, 10))


def test_long_chains_give_the_exact_gradient_of_the_enumerated_rbm(make_generator: Factory) -> None:
    """Cosine ≥ 0.99 and relative error ≤ 5 % against ∇(⟨E⟩_data + log Z) with all 32 hidden states listed.

    False alarm: 1e-6. 20,000 negatives leave a root mean square error of 0.7 %, of which 5 % is seven times (as above).
    Exact samples in the place of chains pass, too: a yardstick. Power: CD-1 is off by more than 50 %.
    """
    rbm, n = RBM, 20_000
    x_data = OTHER_RBM.sample(5000, make_generator(11))
    exact = gradient(rbm, rbm(x_data).mean() + rbm.log_partition())
    start = 2 * torch.randn(n, 4, generator=make_generator(12), dtype=torch.float64)
    negatives = {
        "exact samples": rbm.sample(n, make_generator(13)),
        "ULA": negatives_from_noise(Langevin(0.02, 250), rbm, n, lambda n, g: start, make_generator(14)),
        "MALA": MALA(0.4, 80).sample(rbm, start, generator=make_generator(15)),
    }
    for name, x_neg in negatives.items():
        cosine, error = agreement(gradient(rbm, cd_loss(rbm(x_data), rbm(x_neg)).loss), exact)
        assert cosine >= 0.99 and error <= 0.05, f"{name}: cosine {cosine:.4f}, relative error {error:.3f}"
    one = negatives_from_data(Langevin(0.02, 1), rbm, x_data, make_generator(8))
    assert agreement(gradient(rbm, cd_loss(rbm(x_data), rbm(one)).loss), exact)[1] > 0.5


# The bias of CD-1, without any randomness: data, noise and model by quadrature


class Features(nn.Module):
    """E(x) = Σ θᵢ fᵢ(x) on the line: the gradient with respect to θ is f, so that everything can be integrated."""

    def __init__(self, theta: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    @staticmethod
    def features(x: Tensor) -> Tensor:
        return torch.stack([x, x.square() / 2, x**3 / 3, x**4 / 4, torch.cos(2 * x)], -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x[:, 0]) @ self.theta


LINE = make_grid([(-4.0, 4.0)], 4000).points
NODES, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))


def model_law(theta: list[float]) -> Tensor:
    return boltzmann_probs(Features(theta)(LINE)).detach()


def exact_gradient(data: Tensor, theta: list[float]) -> Tensor:
    return (data - model_law(theta)) @ Features.features(LINE[:, 0])


def expected_cd_1(data: Tensor, theta: list[float], eta: float) -> Tensor:
    """E[∇E(x) − ∇E(x')] for x from the data and x' one ULA step further, over all noise."""
    slope = energy_and_grad(Features(theta), LINE)[1][:, 0]
    moved = (LINE[:, 0] - eta * slope)[:, None] + noise_scale_for(eta, 1.0) * NODES
    after = (Features.features(moved) * (WEIGHTS / WEIGHTS.sum())[:, None]).sum(1)
    return data @ (Features.features(LINE[:, 0]) - after)


def score_matching_gradient(data: Tensor, theta: list[float]) -> Tensor:
    """∇_θ of Hyvärinen's objective E[E'(x)²/2 − E''(x)], with the derivatives of the features written down."""
    x = LINE[:, 0]
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    first = torch.stack([one, x, x.square(), x**3, -2 * torch.sin(2 * x)], 1)
    second = torch.stack([zero, one, 2 * x, 3 * x.square(), -4 * torch.cos(2 * x)], 1)
    slope = first @ torch.tensor(theta, dtype=torch.float64)
    return data @ (slope[:, None] * first - second)


MODEL = [0.1, -1.0, 0.2, 1.5, 0.3]
DATA = [-0.2, 0.5, 0.0, 1.0, -0.2]
TWO_FAR_WELLS = [0.0, -16.0, 0.0, 16.0, 0.0]  # 4(x² − 1)²: wells at ±1, a barrier of 4 temperatures


def test_cd_1_is_score_matching_to_first_order() -> None:
    """CD-1 / η → the gradient of score matching, error of order η (Hyvärinen 2007), and not that of likelihood."""
    data = model_law(DATA)
    limit = score_matching_gradient(data, MODEL)
    errors = [(expected_cd_1(data, MODEL, eta) / eta - limit).norm().item() for eta in (4e-4, 2e-4, 1e-4)]
    assert errors[-1] < 2e-3 * limit.norm().item()
    assert all(a / b == pytest.approx(2, rel=0.05) for a, b in itertools.pairwise(errors))
    cosine, _ = agreement(expected_cd_1(data, MODEL, 1e-4), exact_gradient(data, MODEL))
    assert 0 < cosine < 0.95, "uphill in likelihood here, but in another direction"


def test_cd_1_bias_vanishes_where_data_and_model_agree() -> None:
    """With data from the model the exact gradient is 0, and CD-1's is of second order: half the step, a quarter."""
    data = model_law(MODEL)
    assert exact_gradient(data, MODEL).abs().max() < 1e-12
    biases = [expected_cd_1(data, MODEL, eta).norm().item() for eta in (4e-3, 2e-3, 1e-3)]
    assert all(a / b == pytest.approx(4, rel=0.1) for a, b in itertools.pairwise(biases))
    elsewhere = [expected_cd_1(model_law(DATA), MODEL, eta).norm().item() for eta in (4e-3, 2e-3, 1e-3)]
    assert all(a / b == pytest.approx(2, rel=0.1) for a, b in itertools.pairwise(elsewhere))
    assert elsewhere[-1] > 20 * biases[-1]


def test_cd_1_is_blind_to_the_shares_of_distant_modes() -> None:
    """Wells that are right in shape and wrong in weight: the likelihood pulls at the tilt, CD-1 hardly notices."""
    right = model_law(TWO_FAR_WELLS)
    side = torch.where(LINE[:, 0] < 0, 1.6, 0.4)  # four fifths of the data on the left
    data = right * side / (right * side).sum()
    exact = exact_gradient(data, TWO_FAR_WELLS)
    one = expected_cd_1(data, TWO_FAR_WELLS, 0.01)
    assert exact[0] < -0.5, "E = θ₀x + …: data sit further left than the model"
    assert one.norm() < 0.02 * exact.norm() and expected_cd_1(right, TWO_FAR_WELLS, 0.01).norm() < 0.02
    near = [0.0, -1.0, 0.0, 1.0, 0.0]  # the same wells, a barrier of a quarter: chains cross
    flat = model_law(near)
    share = flat * side / (flat * side).sum()
    lost = [expected_cd_1(d, t, 0.01)[0] / exact_gradient(d, t)[0] for d, t in ((share, near), (data, TWO_FAR_WELLS))]
    assert lost[0] > 2 * abs(lost[1])


@pytest.mark.parametrize("eta", [0.003, 0.03])
def test_cd_1_of_the_library_has_that_bias(eta: float, make_generator: Factory) -> None:
    """Sampled CD-1 gradients within 5.7 standard errors of the quadrature, five components: false alarm 1.2e-7 in all.

    Power: the exact gradient, and the quadrature for twice the step, are more than ten standard errors away.
    """
    energy, data, n = Features(MODEL), model_law(DATA), 100_000
    width = LINE[1, 0] - LINE[0, 0]
    cells = torch.multinomial(data, n, replacement=True, generator=make_generator(16))
    x = LINE[cells] + width * (torch.rand(n, 1, generator=make_generator(17), dtype=torch.float64) - 0.5)
    x_neg = negatives_from_data(Langevin(eta, 1), energy, x, make_generator(18))
    found = gradient(energy, cd_loss(energy(x), energy(x_neg)).loss)
    difference = Features.features(x[:, 0]) - Features.features(x_neg[:, 0])
    error = difference.std(0) / math.sqrt(n)

    def z(expected: Tensor) -> float:
        return ((found - expected) / error).abs().max().item()

    assert z(expected_cd_1(data, MODEL, eta)) < Z_LIMIT
    assert z(exact_gradient(data, MODEL)) > 10 + Z_LIMIT
    assert z(expected_cd_1(data, MODEL, 2 * eta)) > (10 + Z_LIMIT if eta > 0.01 else Z_LIMIT)


def test_one_exact_step_from_the_model_has_no_bias(make_generator: Factory) -> None:
    """With data from the model, CD-1 by MALA is 0 on average at any step size, CD-1 by ULA is not.

    Five components, 5.7 standard errors: false alarm 6e-8. Power: ULA at the same step is more than ten away.
    """
    rbm, n = RBM, 60_000
    x = rbm.sample(n, make_generator(20))
    for name, sampler in (("MALA", MALA(0.3, 1)), ("ULA", Langevin(0.3, 1))):
        x_neg = sampler.sample(rbm, x, generator=make_generator(21))
        moments = torch.stack([x_neg.square().sum(1), rbm(x_neg).detach(), *x_neg.T[:3]], 1)
        before = torch.stack([x.square().sum(1), rbm(x).detach(), *x.T[:3]], 1)
        difference = moments - before
        z = (difference.mean(0) / (difference.std(0) / math.sqrt(n))).abs().max().item()
        assert z < Z_LIMIT if name == "MALA" else z > 10 + Z_LIMIT, (name, z)
