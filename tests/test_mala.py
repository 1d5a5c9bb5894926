"""MALA: its acceptance ratio, the law that it keeps, its limits, its options, its errors, its adaptation.

A correct MALA leaves the Boltzmann density exactly where it is, at every step size. So the tests of its law start from
exact samples, make some steps and ask for exact samples again; a mistake drives the chains away. Every mistake that the
suite claims to catch is planted and caught in a test of its own (power). False alarms are registered in ledger.py.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode

from ebm_lit import langevin
from ebm_lit.boltzmann import boltzmann_probs, double_well, make_grid, quadratic
from ebm_lit.data import toy
from ebm_lit.energy import EnergyCNN, EnergyMLP, EnergyShapeError, energy_and_grad
from ebm_lit.langevin import (
    MALA,
    Langevin,
    MALAStep,
    NonFiniteError,
    acceptance_margin,
    mala_step,
    quadratic_law,
    uniform_init,
)

Factory = Callable[..., torch.Generator]
Energy = Callable[[Tensor], Tensor]


def well(x: Tensor) -> Tensor:
    return double_well(x, barrier=1.0, tilt=0.2)


def start(energy: Energy, x: Tensor) -> MALAStep:
    return MALAStep(x, *energy_and_grad(energy, x), torch.zeros(len(x), dtype=torch.bool))


# The ratio


class Move(NamedTuple):
    """A proposal and what is known at both of its ends."""

    x: Tensor
    e: Tensor
    grad: Tensor
    y: Tensor
    e_y: Tensor
    grad_y: Tensor
    eta: float
    temperature: float

    def log_q(self, a: Tensor, slope: Tensor, b: Tensor, eta: float | None = None) -> Tensor:
        """log density of the Langevin move a → b, from the library of distributions."""
        eta = self.eta if eta is None else eta
        return Normal(a - eta * slope, math.sqrt(2 * eta * self.temperature)).log_prob(b).flatten(1).sum(1)

    def forth(self, **changes: float) -> Tensor:
        return self.log_q(self.x, self.grad, self.y, **changes)

    def back(self, **changes: float) -> Tensor:
        return self.log_q(self.y, self.grad_y, self.x, **changes)

    def fall(self) -> Tensor:
        return (self.e - self.e_y) / self.temperature


def log_ratio(m: Move) -> Tensor:
    """As the definition has it: log p(y) − log p(x) + log q(y → x) − log q(x → y)."""
    return m.fall() + m.back() - m.forth()


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4, 4)])
@pytest.mark.parametrize("eta", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 30.0])
def test_margin_is_the_definition(
    shape: tuple[int, ...], eta: float, temperature: float, make_generator: Factory
) -> None:
    x, y = torch.randn(2, 20, *shape, generator=make_generator(0), dtype=torch.float64)
    m = Move(x, *energy_and_grad(well, x), y, *energy_and_grad(well, y), eta, temperature)
    margin = acceptance_margin(y - x, m.e, m.grad, m.e_y, m.grad_y, eta)
    torch.testing.assert_close(margin / temperature, log_ratio(m), rtol=1e-9, atol=1e-8)
    back = acceptance_margin(x - y, m.e_y, m.grad_y, m.e, m.grad, torch.full((20,), eta, dtype=x.dtype))
    torch.testing.assert_close(back, -margin, rtol=1e-12, atol=1e-12)


def test_margin_on_a_spring_by_hand() -> None:
    """η/4 · (x² − y²): from 0 to 2 with η = 1 it is −1, back it is +1."""
    zero, two = torch.tensor([[0.0]]), torch.tensor([[2.0]])
    assert acceptance_margin(two, quadratic(zero), zero, quadratic(two), two, 1.0).item() == -1.0
    assert acceptance_margin(-two, quadratic(two), two, quadratic(zero), zero, 1.0).item() == 1.0


# The step against a step by hand


def propose(energy: Energy, x: Tensor, noise: Tensor, eta: float, temperature: float) -> Move:
    e, grad = energy_and_grad(energy, x)
    y = x - eta * grad + math.sqrt(2 * eta * temperature) * noise
    return Move(x, e, grad, y, *energy_and_grad(energy, y), eta, temperature)


@dataclass(frozen=True)
class Scripted(MALA):
    """The same sampler with its randomness handed to it."""

    script: Any = None

    def step(
        self, energy: Energy, state: MALAStep, generator: torch.Generator | None = None, step_size: Tensor | None = None
    ) -> MALAStep:
        noise, u = next(self.script)
        return langevin._judge(
            energy, *state[:3], self.step_size, self.temperature, noise=noise, u=u, bounds=self.bounds
        )


def script(noise: Tensor, u: Tensor, rows: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
    return iter([(a[rows], b[rows]) for a, b in zip(noise, u, strict=True)])


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 4, 4)])
@pytest.mark.parametrize("bounds", [None, (-0.7, 1.2)])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_equal_to_a_loop_by_hand(
    shape: tuple[int, ...], bounds: tuple[float, float] | None, temperature: float, make_generator: Factory
) -> None:
    """Under the same noise, with the definition of the ratio: the same decisions, and the same states to 1e-10."""
    g, eta = make_generator(1), 0.08
    x = uniform_init(50, shape, (-0.6, 1.0), g).double()
    noise = torch.randn(12, 50, *shape, generator=g, dtype=torch.float64)
    u = 1 - torch.rand(12, 50, generator=g, dtype=torch.float64)
    chain = Scripted(eta, 12, temperature, bounds, script=script(noise, u)).run(well, x, trajectory=13)
    taken = torch.zeros(50)
    for k in range(12):
        m = propose(well, x, noise[k], eta, temperature)
        accepted = u[k].log() <= log_ratio(m)
        if bounds is not None:
            accepted &= ((m.y >= bounds[0]) & (m.y <= bounds[1])).flatten(1).all(1)
        x = torch.stack([m.y[i] if accepted[i] else m.x[i] for i in range(50)])
        taken += accepted
        assert chain.trajectory is not None
        torch.testing.assert_close(chain.trajectory[k + 1], x, rtol=1e-10, atol=1e-10)
    assert torch.equal(chain.acceptance_rate, taken / 12) and 0 < taken.sum() < 12 * 50


def test_step_carries_energy_and_gradient_along(make_generator: Factory) -> None:
    """What is handed to the next step belongs to the state that was kept, whether the proposal was taken or not."""
    x, g = uniform_init(200, (2,), (-1.5, 1.5), make_generator(2)).double(), make_generator(3)
    state = start(well, x)
    for _ in range(5):
        before, state = state, mala_step(well, *state[:3], 0.15, 0.5, g)
        e, grad = energy_and_grad(well, state.x)
        assert torch.equal(state.energy, e) and torch.equal(state.grad, grad)
        assert torch.equal((state.x != before.x).any(1), state.accepted)
        assert 0 < state.accepted.sum() < 200


def test_each_chain_may_have_its_own_step_size(make_generator: Factory, device: torch.device) -> None:
    x = uniform_init(6, (2, 2), generator=make_generator(4)).to(device)
    e, grad = energy_and_grad(well, x)
    sizes = torch.tensor([0.01, 0.1] * 3, device=device)
    mixed = mala_step(well, x, e, grad, sizes, 0.5, make_generator(5, device))
    for eta, rows in ((0.01, slice(0, None, 2)), (0.1, slice(1, None, 2))):
        same = mala_step(well, x, e, grad, eta, 0.5, make_generator(5, device))
        assert torch.equal(mixed.accepted[rows], same.accepted[rows])
        torch.testing.assert_close(mixed.x[rows], same.x[rows])


@pytest.mark.parametrize("kind", ["points", "images"])
def test_a_batch_is_its_chains_one_by_one(kind: str, make_generator: Factory) -> None:
    """Each chain decides for itself: alone it goes where it goes in company."""
    shape = (2,) if kind == "points" else (1, 8, 8)
    make = EnergyMLP if kind == "points" else lambda generator: EnergyCNN(shape, generator=generator)
    net, g = make(generator=make_generator(0)).double(), make_generator(6)
    x = uniform_init(5, shape, generator=g).double()
    noise = torch.randn(15, 5, *shape, generator=g, dtype=torch.float64)
    u = 1 - torch.rand(15, 5, generator=g, dtype=torch.float64)
    steep = lambda x: net(x) + 20 * x.flatten(1).square().sum(1)  # noqa: E731

    def run(rows: slice) -> Tensor:
        chain = Scripted(0.02, 15, bounds=(-1.0, 1.0), script=script(noise, u, rows)).run(steep, x[rows])
        assert 0 < chain.acceptance_rate.mean() < 1
        return chain.x

    one_by_one = torch.cat([run(slice(i, i + 1)) for i in range(5)])
    torch.testing.assert_close(run(slice(None)), one_by_one, rtol=1e-10, atol=1e-10)


# The law that is kept


class Experiment(NamedTuple):
    """Exact samples go in, exact samples must come out; `p_values` compares them with the exact law."""

    energy: Energy
    exact: Callable[[int, torch.Generator], Tensor]
    p_values: Callable[[Tensor], dict[str, float]]
    step_size: float
    temperature: float = 1.0
    bounds: tuple[float, float] | None = None


N_STEPS, N_VALUES = 25, 2**14


def uniform_p_values(u: Tensor) -> dict[str, float]:
    """Of independent uniform numbers: their distribution and their order."""
    z = torch.special.ndtri(u.double().flatten().clamp(1e-15, 1 - 1e-15))
    neighbours = (z[1:] * z[:-1]).sum().item() / math.sqrt(len(z) - 1)
    square = z.square().sum().item()
    return {
        "shape": stats.kstest(u.flatten().numpy(), "uniform").pvalue,
        "mean": 2 * stats.norm.sf(abs(z.sum().item()) / math.sqrt(len(z))),
        "variance": min(1.0, 2 * min(stats.chi2.cdf(square, len(z)), stats.chi2.sf(square, len(z)))),
        "independence": 2 * stats.norm.sf(abs(neighbours)),
    }


def spring(k: float, temperature: float, step_size: float, shape: tuple[int, ...] = (1,)) -> Experiment:
    """All coordinates independent N(0, T/k)."""
    scale = math.sqrt(temperature / k)
    return Experiment(
        lambda x: quadratic(x, k),
        lambda n, g: scale * torch.randn(n // math.prod(shape), *shape, generator=g, dtype=torch.float64),
        lambda x: uniform_p_values(torch.special.ndtr(x / scale)),
        step_size,
        temperature,
    )


def line(energy: Energy, box: tuple[float, float], step_size: float, temperature: float, walls: bool) -> Experiment:
    """One dimension: the distribution function by quadrature, samples by inverting it within cells of 1/10,000."""
    (low, high), cells = box, 10_000
    cdf = torch.cat([torch.zeros(1), boltzmann_probs(energy(make_grid([box], cells).points), temperature).cumsum(0)])
    edges = torch.linspace(low, high, cells + 1, dtype=torch.float64)

    def between(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        i = torch.searchsorted(xs, x.contiguous()).clamp(1, cells)
        return ys[i - 1] + (x - xs[i - 1]) / (xs[i] - xs[i - 1]).clamp_min(1e-300) * (ys[i] - ys[i - 1])

    return Experiment(
        energy,
        lambda n, g: between(torch.rand(n, 1, generator=g, dtype=torch.float64), cdf, edges),
        lambda x: uniform_p_values(between(x, edges, cdf).clamp(0, 1)),
        step_size,
        temperature,
        box if walls else None,
    )


def plane(name: str, step_size: float) -> Experiment:
    """A toy with exact samples; chi-square over 20 × 20 cells, those that expect fewer than five pooled."""
    target = toy(name)
    p = boltzmann_probs(target.energy(make_grid(target.bounds, 200).points)).reshape(20, 10, 20, 10).sum((1, 3))

    def p_values(x: Tensor) -> dict[str, float]:
        i, j = ((x + 4) / 8 * 20).long().clamp(0, 19).unbind(1)
        counts, expected = torch.bincount(20 * i + j, minlength=400), p.flatten() * len(x)
        common = expected >= 5
        seen = torch.cat([counts[common], counts[~common].sum()[None]])
        wanted = torch.cat([expected[common], expected[~common].sum()[None]])
        statistic = ((seen - wanted).square() / wanted).sum().item()
        return {"cells": float(stats.chi2.sf(statistic, len(wanted) - 1))}

    return Experiment(target.energy, lambda n, g: target.sample(n, g).double(), p_values, step_size)


EXPERIMENTS = {
    "spring, a large step": spring(1.0, 1.0, 1.0),
    "spring, ULA explodes": spring(1.0, 1.0, 2.5),
    "stiff and cold, two dimensions": spring(4.0, 0.1, 0.3, (2,)),
    "hot, sixteen dimensions": spring(1.0, 300.0, 0.6, (1, 4, 4)),
    "the image samplers' temperature": spring(0.05, 1.25e-6, 15.0),
    "double well": line(well, (-3.5, 3.5), 0.08, 0.5, walls=False),
    "hot double well": line(well, (-4.0, 4.0), 0.2, 1.5, walls=False),
    "spring in a box": line(quadratic, (-1.0, 1.0), 0.1, 1.0, walls=True),
    "ring of Gaussians": plane("mixture", 0.06),
}
N_TESTS = 4 * 8 + 1
FALSE_ALARM = 2e-6  # of all of them together
ALPHA = FALSE_ALARM / N_TESTS


def test_chains_keep_the_exact_law(make_generator: Factory) -> None:
    """False alarm: 2e-6, 33 tests at 6e-8 (Bonferroni). Power: the mutants below."""
    seen = 0
    for seed, (name, one) in enumerate(EXPERIMENTS.items()):
        g = make_generator(100 + seed)
        x = one.exact(N_VALUES, g)
        chain = MALA(one.step_size, N_STEPS, one.temperature, one.bounds).run(one.energy, x, generator=g)
        assert 0.2 < chain.acceptance_rate.mean() < 0.99, "neither all nor nothing: the ratio has something to say"
        for test, p in one.p_values(chain.x).items():
            assert p > ALPHA, f"{test} of {name}: p = {p:.2g}"
            seen += 1
    assert seen == N_TESTS


def test_exact_samples_pass(make_generator: Factory) -> None:
    """False alarm: 2e-6, as above; the samples that the other tests start from are what they should be."""
    for seed, (name, one) in enumerate(EXPERIMENTS.items()):
        for test, p in one.p_values(one.exact(N_VALUES, make_generator(200 + seed))).items():
            assert p > ALPHA, f"{test} of {name}: p = {p:.2g}"


MUTANTS: dict[str, Callable[[Move], Tensor]] = {
    "every proposal is taken (ULA)": lambda m: torch.full_like(m.e, math.inf),
    "the densities of the moves are left out": lambda m: m.fall(),
    "the densities of the moves are swapped": lambda m: m.fall() + m.forth() - m.back(),
    "the energies are left out": lambda m: m.back() - m.forth(),
    "the whole ratio is upside down": lambda m: -log_ratio(m),
    "the way back uses the slope of the way forth": lambda m: m.fall() + m.log_q(m.y, m.grad, m.x) - m.forth(),
    "the ratio believes in half the step": lambda m: m.fall() + m.back(eta=m.eta / 2) - m.forth(eta=m.eta / 2),
    "the temperature is missing at the energies": lambda m: m.e - m.e_y + m.back() - m.forth(),
    "the temperature is counted twice": lambda m: log_ratio(m) / m.temperature,
}


def run_mutant(one: Experiment, ratio: Callable[[Move], Tensor], g: torch.Generator, clamp: bool = False) -> Tensor:
    """The same chains with a mistake in the ratio, or clamped into the box where they should be refused."""
    x, (low, high) = one.exact(N_VALUES, g), one.bounds or (-math.inf, math.inf)
    for _ in range(N_STEPS):
        m = propose(one.energy, x, torch.randn(x.shape, generator=g, dtype=x.dtype), one.step_size, one.temperature)
        u = 1 - torch.rand(len(x), generator=g, dtype=x.dtype)
        accepted = (u.log() <= ratio(m)) & (clamp | ((m.y >= low) & (m.y <= high)).flatten(1).all(1))
        x = torch.where(accepted.view((-1,) + (1,) * (x.ndim - 1)), m.y.clamp(low, high), x)
    return x


def caught(one: Experiment, x: Tensor) -> bool:
    return not bool(torch.isfinite(x).all()) or min(one.p_values(x).values()) < ALPHA


def test_the_loop_for_mutants_without_a_mistake_passes(make_generator: Factory) -> None:
    """False alarm: 6e-7, nine tests at 6e-8. So what is caught below is the mistake and not the loop."""
    for seed, name in enumerate(("spring, a large step", "spring in a box", "ring of Gaussians")):
        assert not caught(EXPERIMENTS[name], run_mutant(EXPERIMENTS[name], log_ratio, make_generator(300 + seed)))


@pytest.mark.parametrize("name", MUTANTS)
def test_power_mistakes_in_the_ratio_are_caught(name: str, make_generator: Factory) -> None:
    """Each shows in at least two of these experiments, by ten standard errors and more: missed below 1e-6."""
    where = [
        label
        for seed, label in enumerate(("stiff and cold, two dimensions", "double well", "hot, sixteen dimensions"))
        if caught(EXPERIMENTS[label], run_mutant(EXPERIMENTS[label], MUTANTS[name], make_generator(400 + seed)))
    ]
    assert len(where) >= 2, where


def test_power_clamped_proposals_are_caught(make_generator: Factory) -> None:
    box = EXPERIMENTS["spring in a box"]
    assert caught(box, run_mutant(box, log_ratio, make_generator(500), clamp=True))


def test_start_is_forgotten(make_generator: Factory) -> None:
    """False alarm: 8e-7, twelve tests at 6e-8. Power: chains that stand still, as they would if one coin decided for

    the whole batch, keep the point that they start from.
    """
    for seed, (name, x, n_steps) in enumerate(
        [
            ("spring, a large step", torch.full((N_VALUES, 1), 3.0), 60),
            ("spring in a box", torch.full((N_VALUES, 1), 0.9), 100),
            ("hot double well", torch.full((N_VALUES, 1), -1.0), 150),
        ]
    ):
        one = EXPERIMENTS[name]
        sampler = MALA(one.step_size, n_steps, one.temperature, one.bounds)
        p_values = one.p_values(sampler.sample(one.energy, x.double(), generator=make_generator(600 + seed)))
        assert min(p_values.values()) > ALPHA, f"{name}: {p_values}"


def balance(x: Tensor, y: Tensor, cells: int = 10) -> float:
    """p-value of "as many go from cell i to cell j as from j to i", for all pairs that at least ten chains joined."""
    edges = torch.linspace(-1.8, 1.8, cells - 1, dtype=torch.float64)
    i, j = (torch.bucketize(t.flatten().contiguous(), edges) for t in (x, y))
    counts = torch.bincount(cells * i + j, minlength=cells**2).reshape(cells, cells).double()
    there, back = counts.triu(1), counts.T.triu(1)
    used = there + back >= 10
    statistic = ((there - back).square() / (there + back))[used].sum().item()
    return float(stats.chi2.sf(statistic, int(used.sum())))


def test_detailed_balance_of_single_steps(make_generator: Factory) -> None:
    """False alarm: 1e-7. Power: one step of ULA, or of MALA without the densities of the moves, is caught."""
    one, g = EXPERIMENTS["double well"], make_generator(700)
    x = one.exact(200_000, g)
    y = mala_step(well, x, *energy_and_grad(well, x), one.step_size, one.temperature, g).x
    assert balance(x, y) > 1e-7
    m = propose(well, x, torch.randn(x.shape, generator=g, dtype=x.dtype), one.step_size, one.temperature)
    u = torch.rand(len(x), generator=g, dtype=x.dtype).log()
    for mistake in (lambda m: torch.full_like(m.e, math.inf), lambda m: m.fall()):
        assert balance(x, torch.where((u <= mistake(m))[:, None], m.y, x)) < 1e-9


# Geweke's joint test


class Model:
    """Parameters θ ~ N(0, I₂), three data y ~ N(θ₀ + θ₁², ¼) each: a curved posterior."""

    @staticmethod
    def data(theta: Tensor, g: torch.Generator) -> Tensor:
        centre = theta[:, 0] + theta[:, 1].square()
        return centre[:, None] + 0.5 * torch.randn(len(theta), 3, generator=g, dtype=theta.dtype)

    @staticmethod
    def posterior(y: Tensor) -> Energy:
        """−log p(θ, y), each chain with its own data."""

        def energy(theta: Tensor) -> Tensor:
            centre = theta[:, 0] + theta[:, 1].square()
            return theta.square().sum(1) / 2 + 2 * (y - centre[:, None]).square().sum(1)

        return energy

    @staticmethod
    def summaries(theta: Tensor, y: Tensor) -> Tensor:
        """Functions of parameters and data whose means are compared."""
        a, b, m = theta[:, 0], theta[:, 1], y.mean(1)
        bounded = [torch.tanh(m), torch.tanh(a * m), torch.cos(b * m), y.std(1)]
        return torch.stack([a, b, a.square(), b.square(), a * b, a * b.square(), *bounded], 1)


def geweke(step: Callable[[Energy, Tensor, torch.Generator], Tensor], g: torch.Generator) -> float:
    """The smallest of ten p-values: marginal-conditional against successive-conditional simulation.

    Both produce pairs (θ, y) of the same joint law if, and only if, the transition keeps the posterior of every y. The
    second alternates transitions of θ given y with fresh y given θ, from a start that has the joint law; B chains side
    by side give independent pairs. Source: Geweke 2004, "Getting it right", section 3.
    """
    n = 30_000

    def prior() -> tuple[Tensor, Tensor]:
        theta = torch.randn(n, 2, generator=g, dtype=torch.float64)
        return theta, Model.data(theta, g)

    expected = Model.summaries(*prior())
    theta, y = prior()
    for _ in range(20):
        theta = step(Model.posterior(y), theta, g)
        y = Model.data(theta, g)
    found = Model.summaries(theta, y)
    error = ((expected.var(0) + found.var(0)) / n).sqrt()
    z = (expected.mean(0) - found.mean(0)) / error
    return float(2 * stats.norm.sf(z.abs().max().item()))


GEWEKE_ALPHA = 1e-7  # of each of the ten comparisons


def test_geweke_joint_distribution(make_generator: Factory) -> None:
    """False alarm: 1e-6, ten comparisons at 1e-7. Power: every mutant of the ratio below is caught."""

    def step(energy: Energy, theta: Tensor, g: torch.Generator) -> Tensor:
        return MALA(0.08, n_steps=2).sample(energy, theta, generator=g)

    assert geweke(step, make_generator(800)) > GEWEKE_ALPHA


@pytest.mark.parametrize("name", [n for n in MUTANTS if "temperature" not in n])
def test_power_geweke_catches_mistakes(name: str, make_generator: Factory) -> None:
    """The temperature is 1 here, so that mistakes with it do not show; all others must."""

    def step(energy: Energy, theta: Tensor, g: torch.Generator) -> Tensor:
        for _ in range(2):
            m = propose(energy, theta, torch.randn(theta.shape, generator=g, dtype=theta.dtype), 0.08, 1.0)
            accepted = torch.rand(len(theta), generator=g, dtype=theta.dtype).log() <= MUTANTS[name](m)
            theta = torch.where(accepted[:, None], m.y, theta)
        return theta.nan_to_num(9.0, 9.0, -9.0).clamp(-9, 9)  # what explodes is caught by its moments

    assert geweke(step, make_generator(900)) < GEWEKE_ALPHA


# Limiting cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_steps_are_taken_and_huge_ones_refused(dtype: torch.dtype, make_generator: Factory) -> None:
    x = uniform_init(500, (3,), (-1.5, 1.5), make_generator(7)).to(dtype)
    tiny = MALA(1e-7, 20).run(well, x, generator=make_generator(8))
    assert (tiny.acceptance_rate > 0.9).all() and tiny.acceptance_rate.mean() > 0.995
    for eta in (1e3, 1e10, 1e30):
        huge = MALA(eta, 20).run(well, x, generator=make_generator(8))
        assert (huge.acceptance_rate == 0).all() and torch.equal(huge.x, x)


@pytest.mark.parametrize("eta", [0.01, 0.1, 0.3, 1.0])
def test_without_temperature_a_chain_descends_or_stays(eta: float) -> None:
    """Where it moves, the energy falls by at least η/4·‖∇E(x) + ∇E(y)‖²; no randomness is left."""
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    for _ in range(10):
        e, grad = energy_and_grad(well, x)
        s = mala_step(well, x, e, grad, eta, temperature=0.0)
        assert torch.equal(s.x, torch.where(s.accepted[:, None], x - eta * grad, x))
        enough = eta / 4 * (grad + s.grad).square().sum(1)
        assert (e - s.energy >= enough - 1e-12)[s.accepted].all()
        x = s.x


def test_without_temperature_on_a_spring() -> None:
    """Every step with ηk < 2 is taken and multiplies x by 1 − ηk; beyond, none is."""
    x = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    for eta, factor in ((0.1, 0.9), (1.0, 0.0), (1.9, -0.9), (2.1, 1.0)):
        torch.testing.assert_close(MALA(eta, 1, 0.0).sample(quadratic, x), factor * x, rtol=1e-12, atol=1e-15)


def test_a_flat_energy_takes_every_step(make_generator: Factory) -> None:
    chain = MALA(0.5, 4).run(lambda x: 0 * x.sum(1), torch.zeros(50, 2), generator=make_generator(9))
    assert (chain.acceptance_rate == 1).all() and 0 < chain.x.abs().max() < 20


def test_agrees_with_ula_where_steps_are_small(make_generator: Factory) -> None:
    """The same noise, and hardly a refusal: the two chains differ by what was refused."""
    x = torch.zeros(100, 2, dtype=torch.float64)
    chain = MALA(1e-4, 1).run(well, x, generator=make_generator(10))
    ula = Langevin(1e-4, 1, temperature=1.0).sample(well, x, generator=make_generator(10))
    moved = (chain.x != x).any(1)
    assert moved.double().mean() > 0.95
    torch.testing.assert_close(chain.x[moved], ula[moved], rtol=1e-12, atol=1e-15)


# Randomness


def test_a_generator_decides_everything(make_generator: Factory, device: torch.device) -> None:
    sampler, x = MALA(0.5, n_steps=6), torch.zeros(40, 3, device=device)
    before = torch.get_rng_state()
    first = sampler.sample(quadratic, x, generator=make_generator(1, device))
    assert torch.equal(first, sampler.sample(quadratic, x, generator=make_generator(1, device)))
    assert not torch.equal(first, sampler.sample(quadratic, x, generator=make_generator(2, device)))
    g = make_generator(1, device)
    halves = sampler.sample(quadratic, sampler.sample(quadratic, x, n_steps=2, generator=g), n_steps=4, generator=g)
    torch.testing.assert_close(first, halves)  # a chain interrupted is the same chain
    chain = sampler.run(quadratic, x, generator=make_generator(1, device), trajectory=3, diagnostics=True)
    assert torch.equal(first, chain.x), "looking does not disturb"
    adapted = [sampler.adapt(quadratic, x, generator=make_generator(3, device)) for _ in range(2)]
    assert adapted[0].sampler == adapted[1].sampler and torch.equal(adapted[0].x, adapted[1].x)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not used"


# What a chain reports


def test_acceptance_rates_and_diagnostics_are_what_they_say(make_generator: Factory) -> None:
    x = torch.randn(30, 2, generator=make_generator(11), dtype=torch.float64)
    chain = MALA(0.8, 450).run(quadratic, x, generator=make_generator(12), trajectory=451, diagnostics=True)
    assert chain.trajectory is not None and chain.diagnostics is not None
    moved = (chain.trajectory.diff(dim=0) != 0).any(2).float()
    torch.testing.assert_close(chain.acceptance_rate, moved.mean(0))
    d = chain.diagnostics
    assert d.steps.tolist() == list(range(0, 450, 3)) and chain.n_steps == 450
    torch.testing.assert_close(d.acceptance_rate, moved.mean(1).reshape(150, 3).mean(1).double())
    recorded = chain.trajectory[:-1][::3]
    torch.testing.assert_close(d.energy, torch.stack([quadratic(s).mean() for s in recorded]))
    torch.testing.assert_close(d.grad_norm, recorded.norm(dim=2).mean(1))


@pytest.mark.parametrize("n_steps", [1, 7, 199, 200, 201, 399])
def test_diagnostics_take_bounded_memory(n_steps: int) -> None:
    d = MALA(0.1, n_steps).run(quadratic, torch.ones(2, 1), diagnostics=True).diagnostics
    assert d is not None
    sizes = {len(field) for field in d}
    assert sizes == {n_steps} if n_steps <= 200 else len(sizes) == 1 and 100 <= sizes.pop() <= 200
    assert ((d.acceptance_rate >= 0) & (d.acceptance_rate <= 1)).all()


def test_no_steps_return_a_copy() -> None:
    x = torch.ones(3, 2)
    chain = MALA(0.1).run(quadratic, x, n_steps=0, trajectory=5, diagnostics=True)
    assert torch.equal(chain.x, x) and chain.x.data_ptr() != x.data_ptr() and chain.n_steps == 0
    assert chain.acceptance_rate.isnan().all(), "no steps, no rate"
    assert chain.trajectory is not None and chain.trajectory.shape == (1, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_shape_and_device_are_kept(dtype: torch.dtype, device: torch.device, make_generator: Factory) -> None:
    x = torch.ones(4, 1, 3, 3, dtype=dtype, device=device)
    chain = MALA(0.1, 5).run(quadratic, x, generator=make_generator(0, device), trajectory=2)
    for t in (chain.x, chain.trajectory[0]):
        assert t.dtype == dtype and t.shape == x.shape and t.device.type == device.type
    assert chain.acceptance_rate.shape == (4,) and chain.acceptance_rate.device.type == device.type
    assert torch.equal(x, torch.ones_like(x)), "the start is left untouched"


# Adaptation


@pytest.mark.parametrize("dim", [1, 20])
@pytest.mark.parametrize("temperature", [0.01, 5.0])
@pytest.mark.parametrize("first", [1e-6, 1e3])
def test_adaptation_reaches_its_target(dim: int, temperature: float, first: float, make_generator: Factory) -> None:
    """The rate of 100 chains × 200 steps is within 0.05 of the target, eight standard errors: false alarm 1e-9."""
    x = math.sqrt(temperature) * torch.randn(100, dim, generator=make_generator(13))
    before = MALA(first, temperature=temperature)
    result = before.adapt(quadratic, x, n_steps=400, generator=make_generator(14))
    assert before == MALA(first, temperature=temperature) and result.sampler is not before, "a new, frozen sampler"
    assert dataclasses.replace(result.sampler, step_size=first) == before, "only the step size differs"
    assert result.step_sizes.shape == result.acceptance_rate.shape == (400,)
    assert result.step_sizes[0].item() == pytest.approx(first) and isinstance(result.sampler.step_size, float)
    rate = result.sampler.run(quadratic, result.x, n_steps=200, generator=make_generator(15)).acceptance_rate.mean()
    assert abs(rate.item() - 0.574) < 0.05


def test_adaptation_to_another_target_and_with_one_chain(make_generator: Factory) -> None:
    x = torch.randn(1, 10, generator=make_generator(16))
    tuned = MALA(1.0).adapt(quadratic, x, n_steps=1500, target=0.9, generator=make_generator(17)).sampler
    many = torch.randn(500, 10, generator=make_generator(18))
    rate = tuned.run(quadratic, many, n_steps=50, generator=make_generator(19)).acceptance_rate.mean().item()
    assert abs(rate - 0.9) < 0.06


@pytest.mark.parametrize(
    ("settings", "call"),
    [({}, {"target": 0.0}), ({}, {"target": 1.0}), ({"temperature": 0.0}, {}), ({}, {"n_steps": 0})],
)
def test_adaptation_refuses_what_has_no_meaning(settings: dict[str, Any], call: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="adapt needs 0 < target < 1, temperature > 0 and n_steps >= 1") as error:
        MALA(0.1, **settings).adapt(quadratic, torch.ones(2, 2), **call)
    assert "\n" not in str(error.value)


# Leaves no trace


class Failing(nn.Module):
    """A network that fails at its third evaluation, in one of several ways."""

    def __init__(self, how: str, g: torch.Generator) -> None:
        super().__init__()
        self.net, self.how, self.calls = EnergyMLP(generator=g), how, 0
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        e = self.net(self.norm(x))
        if self.calls < 3 or self.how == "works":
            return e
        if self.how == "raises":
            raise KeyboardInterrupt
        return e[:, None] if self.how == "shape" else e * math.nan


@pytest.mark.parametrize("method", ["run", "adapt"])
@pytest.mark.parametrize("how", ["works", "raises", "shape", "nan"])
def test_sampling_leaves_no_trace(how: str, method: str, make_generator: Factory) -> None:
    net = Failing(how, make_generator(0)).train()
    next(net.parameters()).requires_grad_(False)
    for p in net.parameters():
        p.grad = torch.full_like(p, 3.0)

    def portrait() -> list[Any]:
        parameters = [(p.requires_grad, p.tolist(), p.grad.tolist()) for p in net.parameters() if p.grad is not None]
        return [parameters, [m.training for m in net.modules()], [b.tolist() for b in net.buffers()]]

    before, x = portrait(), torch.ones(4, 2, requires_grad=True)
    call = lambda: getattr(MALA(0.1, 5), method)(net, x, generator=make_generator(1))  # noqa: E731
    errors = {"raises": KeyboardInterrupt, "shape": EnergyShapeError, "nan": NonFiniteError}
    if how == "works":
        assert not call().x.requires_grad
    else:
        with pytest.raises(errors[how]):
            call()
    assert portrait() == before and x.grad is None and torch.equal(x, torch.ones(4, 2)) and torch.is_grad_enabled()


@pytest.mark.parametrize("caller", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(caller: Callable[[], Any], make_generator: Factory) -> None:
    net = EnergyMLP(generator=make_generator(0))
    expected = MALA(0.1, 4).sample(net, torch.ones(3, 2), generator=make_generator(1))
    with caller():
        y = MALA(0.1, 4).sample(net, torch.ones(3, 2), generator=make_generator(1))
    assert torch.equal(y, expected) and not y.requires_grad and not y.is_inference()


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.WAITS
        return func(*args, **(kwargs or {}))


def test_the_loop_reads_nothing_from_the_device(make_generator: Factory) -> None:
    net, sampler = EnergyMLP(generator=make_generator(0)), MALA(0.1, bounds=(-2.0, 2.0))
    counts = {}
    for n in (3, 40):
        with Reads() as reads:
            sampler.run(net, torch.ones(4, 2), n_steps=n, trajectory=5, diagnostics=True)
            sampler.adapt(net, torch.ones(4, 2), n_steps=n)
        counts[n] = reads.count
    assert counts[3] == counts[40] <= 1, "only the tuned step size itself is read, once, at the end"


@pytest.mark.cuda
def test_the_loop_never_waits_for_cuda(make_generator: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    net = EnergyCNN((1, 28, 28), generator=make_generator(0)).cuda()
    sampler, g = MALA(0.1, bounds=(-1.0, 1.0)), make_generator(1, "cuda")
    x = uniform_init(8, (1, 28, 28), generator=g)
    read = langevin._Walk.check

    def check(self: Any, n_steps: int) -> None:
        torch.cuda.set_sync_debug_mode("default")  # the one read, after the loop
        read(self, n_steps)

    monkeypatch.setattr(langevin._Walk, "check", check)
    for method in (sampler.run, sampler.adapt):
        method(net, x, n_steps=2, generator=g)  # libraries initialise themselves
        try:
            torch.cuda.set_sync_debug_mode("error")
            method(net, x, n_steps=20, generator=g)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Densities of zero, and numbers that are none


def test_bounds_are_kept_and_nothing_piles_up(make_generator: Factory) -> None:
    x = uniform_init(500, (4,), (-1.0, 1.0), make_generator(20))
    chain = MALA(0.05, 60, bounds=(-1.0, 1.0)).run(quadratic, x, generator=make_generator(21), trajectory=61)
    assert chain.trajectory is not None and chain.trajectory.abs().max() <= 1
    assert (chain.x.abs() == 1).sum() == 0


def test_the_energy_is_not_asked_outside_the_bounds(make_generator: Factory) -> None:
    def inside_only(x: Tensor) -> Tensor:
        assert x.abs().max() <= 1, "asked outside"
        return quadratic(x)

    MALA(0.5, 30, bounds=(-1.0, 1.0)).run(inside_only, torch.zeros(100, 2), generator=make_generator(22))


@pytest.mark.parametrize("slope", ["zero", "nan"])
def test_an_infinite_energy_is_a_wall(slope: str, make_generator: Factory) -> None:
    """Density zero: refused, no error, whatever the gradient there; the half Gaussian is kept.

    False alarm: 2e-7, two Kolmogorov-Smirnov tests. Power: chains that cross the wall or stick to it fail for certain.
    """

    def half(x: Tensor) -> Tensor:
        e = quadratic(x)
        if slope == "zero":
            return torch.where(x[:, 0] >= 0, e, math.inf)
        return e + torch.where(x[:, 0] >= 0, 0.0, math.inf) + 0 * x[:, 0].clamp(max=0).abs().sqrt()

    g = make_generator(23)
    x = torch.randn(20_000, 1, generator=g, dtype=torch.float64).abs().clamp_min(1e-12)
    if slope == "nan":
        edge = energy_and_grad(half, torch.tensor([[-1.0]], dtype=torch.float64))
        assert edge[0].item() == math.inf
    x = MALA(0.3, 30).sample(half, x, generator=g)
    assert (x >= 0).all() and stats.kstest(x.flatten().numpy(), "halfnorm").pvalue > 1e-7


def cliff(bad: float) -> Energy:
    """Without a usable energy beyond 0.5."""
    return lambda x: torch.where(x[:, 0] > 0.5, x[:, 0] * 0 + bad, quadratic(x))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_energies_that_are_no_answer_are_reported(bad: float, make_generator: Factory) -> None:
    x = torch.zeros(200, 2)
    message = r"a proposal's energy was NaN or −inf, or its gradient not finite, at step \d+ of 50; try a smaller"
    for method in (MALA(0.05, 50).run, MALA(0.05, 50).adapt):
        with pytest.raises(NonFiniteError, match=message) as error:
            method(cliff(bad), x, generator=make_generator(24))
        assert "\n" not in str(error.value)


def test_the_first_bad_step_is_named(make_generator: Factory) -> None:
    calls = 0

    def energy(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return quadratic(x) + (math.nan if calls == 1 + 4 else 0.0)  # the start, and proposals 0, 1, 2, 3

    with pytest.raises(NonFiniteError, match="at step 3 of 20"):
        MALA(0.1, 20).run(energy, torch.ones(5, 1), generator=make_generator(25))


class Unsloped(torch.autograd.Function):
    """The identity, whose slope beyond 1 is nobody's guess."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.where(ctx.saved_tensors[0] > 1, math.nan, grad)


def test_a_bad_gradient_with_a_good_energy_is_reported(make_generator: Factory) -> None:
    energy = lambda x: quadratic(Unsloped.apply(x))  # noqa: E731
    assert torch.isfinite(energy_and_grad(energy, torch.full((1, 1), 1.5))[0]).all()
    with pytest.raises(NonFiniteError, match="its gradient not finite, at step"):
        MALA(0.5, 50).run(energy, torch.zeros(100, 1), generator=make_generator(26))


def test_a_step_marks_the_chain_that_met_nan_and_only_that(make_generator: Factory) -> None:
    x = torch.zeros(2000, 1)
    s = mala_step(cliff(math.nan), *start(cliff(math.nan), x)[:3], 0.3, 1.0, make_generator(27))
    bad = s.energy.isnan()
    assert 0 < bad.sum() < 2000 and not s.accepted[bad].any() and (s.x[bad] == 0).all() and s.accepted[~bad].any()
    again = mala_step(cliff(math.nan), *s[:3], 1e-6, 1.0, make_generator(28))
    assert again.energy[bad].isnan().all(), "it stays until somebody looks"


def test_overflow_of_a_proposal_is_a_refusal(make_generator: Factory) -> None:
    chain = MALA(1e38, 5, temperature=1e38).run(quadratic, torch.ones(4, 2), generator=make_generator(29))
    assert torch.equal(chain.x, torch.ones(4, 2))


@pytest.mark.parametrize(
    ("energy", "x", "message"),
    [
        (quadratic, torch.tensor([[math.nan, 0.0]]), "x_init holds NaN or infinite values: no chain can start there"),
        (quadratic, torch.tensor([[math.inf, 0.0]]), "x_init holds NaN or infinite values: no chain can start there"),
        (cliff(math.inf), torch.tensor([[1.0, 0.0]]), "the energy of x_init holds NaN or infinite values"),
        (cliff(math.nan), torch.tensor([[1.0, 0.0]]), "the energy of x_init holds NaN or infinite values"),
        (lambda x: x.sqrt().sum(1), torch.zeros(1, 2), "the gradient at x_init holds NaN or infinite values"),
    ],
)
def test_starts_without_a_density(energy: Energy, x: Tensor, message: str) -> None:
    for n_steps in (0, 3):
        with pytest.raises(NonFiniteError, match=message):
            MALA(0.1, n_steps).run(energy, x)


def test_starts_outside_the_bounds() -> None:
    with pytest.raises(
        ValueError, match=r"x_init must lie within bounds \(-1.0, 1.0\): outside them the density is zero"
    ):
        MALA(0.1, bounds=(-1.0, 1.0)).run(quadratic, torch.tensor([[0.0], [1.5]]))


# Errors: one line each


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, "step_size must be a finite number > 0, got 0.0"),
        ({"step_size": math.nan}, "step_size"),
        ({"step_size": math.inf}, "step_size"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"n_steps": -1}, "n_steps must be a whole number >= 0, got -1"),
        ({"n_steps": 2.5}, "n_steps must be a whole number"),
        ({"bounds": (1.0, -1.0)}, "low < high"),
        ({"bounds": (math.nan, 1.0)}, "low < high"),
        ({"bounds": (1.0,)}, "low < high"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MALA(**({"step_size": 0.1} | settings))
    assert "\n" not in str(error.value)


def test_settings_are_immutable() -> None:
    sampler = MALA(0.1, bounds=(-1, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.step_size = 0.2  # type: ignore[misc]
    assert sampler == MALA(0.1, bounds=(-1, 1)) and hash(sampler) == hash(MALA(0.1, bounds=(-1, 1)))


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(2, 3, dtype=torch.int64), torch.ones(0, 3), [[1.0]]])
@pytest.mark.parametrize("method", ["run", "sample", "adapt"])
def test_unusable_starts(x: Any, method: str) -> None:
    with pytest.raises(ValueError, match=r"x_init must be a non-empty floating-point tensor \(B, \*shape\), got"):
        getattr(MALA(0.1), method)(quadratic, x)


@pytest.mark.parametrize("wrong", [{"n_steps": -1}, {"trajectory": -2}])
def test_impossible_requests(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a whole number >= 0"):
        MALA(0.1).run(quadratic, torch.ones(2, 1), **wrong)


@pytest.mark.parametrize(
    "energy", [lambda x: x.square().sum(1, keepdim=True), lambda x: x.square().sum(), lambda x: None]
)
def test_energies_of_the_wrong_shape(energy: Any) -> None:
    with pytest.raises(EnergyShapeError, match=r"expected \(4,\)"):
        MALA(0.1).sample(energy, torch.ones(4, 3))


def test_what_mala_repairs(make_generator: Factory) -> None:
    """False alarm: 6e-7 (five standard errors). At ηk = 1 ULA's variance is 2, MALA's is 1."""
    x = torch.randn(20_000, 1, generator=make_generator(30), dtype=torch.float64)
    variance = MALA(1.0, 40).sample(quadratic, x, generator=make_generator(31)).square().mean().item()
    assert quadratic_law(1.0, 1.0, 1.0)[1] == 2.0 and abs(variance - 1) < 5 * math.sqrt(2 / 20_000)
