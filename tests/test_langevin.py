"""The sampler: its step, its exact law on a quadratic, its options, its errors, and the traces it must not leave.

Statistical tests use fixed generators and state the chance that a correct sampler fails them (false alarm) and what a
wrong one must look like to be caught (power). Nothing here depends on luck: the same machine gives the same verdict.
"""

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ebm_lit import langevin
from ebm_lit.boltzmann import boltzmann_probs, double_well, make_grid, quadratic
from ebm_lit.energy import EnergyCNN, EnergyMLP, EnergyShapeError
from ebm_lit.langevin import (
    Langevin,
    NonFiniteError,
    implied_temperature,
    langevin_step,
    noise_scale_for,
    quadratic_law,
    uniform_init,
)

Factory = Callable[..., torch.Generator]


def spring(x: Tensor) -> Tensor:
    """E = ‖x‖²/2."""
    return quadratic(x, 1.0)


# The formulas


def test_one_step_by_hand() -> None:
    x = torch.tensor([[1.0]], dtype=torch.float64)
    assert langevin_step(x, x, 0.1, 0.0, torch.ones_like(x)).item() == pytest.approx(0.9, abs=1e-15)
    assert langevin_step(x, x, 0.1, 0.5, torch.ones_like(x)).item() == pytest.approx(1.4, abs=1e-15)
    assert x.item() == 1.0


def test_noise_and_temperature_are_two_names_of_one_setting() -> None:
    assert noise_scale_for(0.5, 1.0) == 1.0
    assert implied_temperature(10.0, 0.005) == pytest.approx(1.25e-6, rel=1e-12)
    for step_size in (1e-3, 0.7, 10.0):
        for temperature in (0.0, 1e-6, 1.0, 300.0):
            sigma = noise_scale_for(step_size, temperature)
            assert implied_temperature(step_size, sigma) == pytest.approx(temperature, rel=1e-12)
            assert Langevin(step_size, temperature=temperature).sigma == sigma
            assert Langevin(step_size, noise_scale=sigma).implied_temperature == pytest.approx(temperature, rel=1e-12)
    assert Langevin(0.5).implied_temperature == 1.0, "neither temperature nor noise_scale: T = 1"


@pytest.mark.parametrize("step_size", [0.01, 0.5, 1.0, 1.9, 2.5])
def test_quadratic_law_is_the_recursion_carried_on(step_size: float) -> None:
    curvature, temperature, mean, var = 1.0, 0.7, 2.0, 3.0
    for n in range(12):
        expected = quadratic_law(curvature, step_size, temperature, n, 2.0, 3.0)
        assert (mean, var) == pytest.approx(expected, rel=1e-12)
        a = 1 - step_size * curvature
        mean, var = a * mean, a * a * var + 2 * step_size * temperature


def test_quadratic_law_limits() -> None:
    for curvature, step_size in ((1.0, 0.1), (4.0, 0.4), (0.05, 10.0)):
        stationary = quadratic_law(curvature, step_size, 2.0)
        assert quadratic_law(curvature, step_size, 2.0, 1, *stationary) == pytest.approx(stationary, rel=1e-12)
        assert quadratic_law(curvature, step_size, 2.0, 5000, 9.0, 9.0) == pytest.approx(stationary, rel=1e-9)
    assert quadratic_law(3.0, 1e-9, 2.0)[1] == pytest.approx(2.0 / 3.0, rel=1e-8), "small steps: T/k"
    assert quadratic_law(0.0, 0.1, 1.0, 50)[1] == pytest.approx(2 * 0.1 * 50), "no force: diffusion, 2ηTn"
    assert quadratic_law(1.0, 0.1, 0.0, 3, 1.0, 1.0) == pytest.approx((0.9**3, 0.9**6)), "no noise: descent"
    for bad in (0.0, 2.0, 2.5, -0.1):
        with pytest.raises(ValueError, match=r"stationary|step_size"):
            quadratic_law(1.0, bad, 1.0)


# The sampler against the exact law of its own chain


@dataclass(frozen=True)
class Setting:
    """One experiment on E = k‖x‖²/2: all coordinates of all chains are independent and share one Gaussian law."""

    curvature: float
    step_size: float
    temperature: float
    n_steps: int
    mean: float = 0.0  # of the start
    var: float | None = 0.0  # of the start; None: the stationary variance
    shape: tuple[int, ...] = (1,)
    forgotten: bool = False  # has the start been forgotten (to 1e-9)? then the stationary law is expected
    dtype: torch.dtype = torch.float64

    @property
    def start_var(self) -> float:
        return self.law()[1] if self.var is None else self.var

    def law(self, n_steps: int | None = None, **changes: float) -> tuple[float, float]:
        """Mean and variance after `n_steps` (None: stationary), with some settings changed."""
        s = {"curvature": self.curvature, "step_size": self.step_size, "temperature": self.temperature} | changes
        start = {} if n_steps is None else {"mean": self.mean, "var": self.start_var}
        return quadratic_law(s["curvature"], s["step_size"], s["temperature"], n_steps, **start)

    def expected(self) -> tuple[float, float]:
        return self.law(None if self.forgotten else self.n_steps)


SETTINGS = [
    # a few steps from a point
    Setting(1.0, 0.1, 1.0, n_steps=1, mean=1.0),
    Setting(1.0, 0.1, 1.0, n_steps=2, mean=-3.0),
    Setting(1.0, 0.01, 0.5, n_steps=20, mean=2.0),
    Setting(5.0, 0.05, 2.0, n_steps=7, mean=0.5, shape=(3,)),
    # a few steps from a cloud
    Setting(1.0, 0.3, 1.0, n_steps=5, mean=1.0, var=4.0),
    Setting(0.2, 0.5, 4.0, n_steps=10, mean=-1.0, var=0.1, shape=(2,)),
    Setting(100.0, 0.001, 1.0, n_steps=15, mean=0.3, var=0.5),
    Setting(2.0, 0.75, 0.01, n_steps=3, mean=1.0, var=0.01),
    # no force, and a hill instead of a well
    Setting(0.0, 0.1, 1.0, n_steps=30, mean=1.0, var=0.2, shape=(2,)),
    Setting(-1.0, 0.05, 0.3, n_steps=12, mean=0.1, var=0.1),
    # the stationary law stays where it is
    Setting(1.0, 0.1, 1.0, n_steps=25, var=None),
    Setting(3.0, 0.5, 0.2, n_steps=25, var=None, shape=(1, 4, 4)),
    Setting(1.0, 1.5, 1.0, n_steps=9, var=None),
    Setting(0.05, 10.0, 1.25e-6, n_steps=10, var=None, shape=(2,)),
    # the start is forgotten
    Setting(1.0, 0.5, 1.0, n_steps=40, mean=5.0, forgotten=True),
    Setting(4.0, 0.25, 3.0, n_steps=1, mean=7.0, forgotten=True),
    Setting(10.0, 0.15, 100.0, n_steps=45, mean=-2.0, var=9.0, shape=(2,), forgotten=True),
    Setting(1.0, 1.7, 0.5, n_steps=80, mean=1.0, forgotten=True),
    # in single precision, whose rounding is far below what can be seen here
    Setting(1.0, 0.2, 1.0, n_steps=6, mean=1.0, var=1.0, shape=(2,), dtype=torch.float32),
    Setting(2.0, 0.6, 0.5, n_steps=40, mean=1.0, shape=(1, 2, 2), forgotten=True, dtype=torch.float32),
]
N_VALUES = 2**15  # independent values in each setting
TESTS = ("mean", "variance", "shape", "independence")
FALSE_ALARM = 2e-6  # of all 20 settings and all four tests together
ALPHA = FALSE_ALARM / (len(SETTINGS) * len(TESTS))  # Bonferroni: 2.5e-8 for each of the 80 tests


def draw(setting: Setting, seed: int, sampler: Langevin | None = None, n_steps: int | None = None) -> Tensor:
    """Final states of as many chains as give `N_VALUES` numbers."""
    g = torch.Generator().manual_seed(seed)  # conftest.py moves it on where fresh seeds are wanted
    sampler = sampler or Langevin(setting.step_size, temperature=setting.temperature)
    shape = (N_VALUES // math.prod(setting.shape), *setting.shape)
    x = setting.mean + math.sqrt(setting.start_var) * torch.randn(shape, generator=g, dtype=setting.dtype)
    n = setting.n_steps if n_steps is None else n_steps
    return sampler.sample(lambda y: quadratic(y, setting.curvature), x, n_steps=n, generator=g)


def p_values(x: Tensor, mean: float, var: float) -> dict[str, float]:
    """Four tests of "independent N(mean, var)": three are exact, the last is a central limit of 32,767 terms."""
    z = ((x.double().flatten() - mean) / math.sqrt(var)).numpy()
    n = len(z)
    two_sided = [stats.chi2.cdf((z**2).sum(), n), stats.chi2.sf((z**2).sum(), n)]
    neighbours = (z[1:] * z[:-1]).sum() / math.sqrt(n - 1)
    return {
        "mean": 2 * stats.norm.sf(abs(z.sum()) / math.sqrt(n)),
        "variance": min(1.0, 2 * min(two_sided)),
        "shape": stats.kstest(z, "norm").pvalue,
        "independence": 2 * stats.norm.sf(abs(neighbours)),
    }


def test_settings_are_twenty_and_what_they_say() -> None:
    assert len(SETTINGS) == 20
    for s in SETTINGS:
        if s.forgotten:
            (m, v), (_, v_inf) = s.law(s.n_steps), s.law()
            assert abs(m) < 1e-9 * math.sqrt(v_inf) * 100 and v == pytest.approx(v_inf, rel=1e-9)


def test_chain_follows_its_exact_law_in_20_settings() -> None:
    """Joint false alarm: at most 2e-6, 20 settings times four tests at 2.5e-8 each (Bonferroni)."""
    lowest = {}
    for seed, setting in enumerate(SETTINGS):
        for name, p in p_values(draw(setting, seed), *setting.expected()).items():
            assert p > ALPHA, f"{name} of setting {seed} ({setting}): p = {p:.2g}"
            lowest[name, seed] = p
    assert len(lowest) == len(SETTINGS) * len(TESTS)


@dataclass(frozen=True)
class Mutant:
    """A plausible mistake: what it would run in a setting, and the law that its chain then really has."""

    sampler: Callable[[Setting], Langevin]
    law: Callable[[Setting], tuple[float, float]]
    n_steps: Callable[[Setting], int] = lambda s: s.n_steps


def wrong_noise(sigma: Callable[[Setting], float]) -> Mutant:
    def law(s: Setting) -> tuple[float, float]:
        return s.law(s.n_steps, temperature=implied_temperature(s.step_size, sigma(s)))

    return Mutant(lambda s: Langevin(s.step_size, noise_scale=sigma(s)), law)


MUTANTS = {
    "factor 2 missing in the noise": wrong_noise(lambda s: math.sqrt(s.step_size * s.temperature)),
    "variance used as standard deviation": wrong_noise(lambda s: 2 * s.step_size * s.temperature),
    "temperature dropped": wrong_noise(lambda s: math.sqrt(2 * s.step_size)),
    "noise multiplied by the step size": wrong_noise(lambda s: s.step_size * math.sqrt(2 * s.temperature)),
    "half the drift": Mutant(
        lambda s: Langevin(s.step_size / 2, noise_scale=noise_scale_for(s.step_size, s.temperature)),
        lambda s: s.law(s.n_steps, step_size=s.step_size / 2, temperature=2 * s.temperature),
    ),
    "one step too few": Mutant(
        lambda s: Langevin(s.step_size, temperature=s.temperature),
        lambda s: s.law(s.n_steps - 1),
        lambda s: s.n_steps - 1,
    ),
}


def visible(wrong: tuple[float, float], right: tuple[float, float]) -> bool:
    """Off by 10 % in variance or 7 % of a standard deviation in the mean.

    With 32,768 values that is at least 12 standard errors; the tests alarm at 5.6. Chance to miss it: below 1e-9.
    """
    (m, v), (m0, v0) = wrong, right
    return abs(math.log(v / v0) if v > 0 else math.inf) > 0.1 or abs(m - m0) > 0.07 * math.sqrt(v0)


@pytest.mark.parametrize("name", MUTANTS)
def test_power_the_same_test_catches_mistakes(name: str) -> None:
    """Every setting in which a mistake shows is rejected, and each mistake shows in at least six of the 20."""
    mutant, shown = MUTANTS[name], 0
    for seed, setting in enumerate(SETTINGS):
        if not visible(mutant.law(setting), setting.expected()):
            continue
        shown += 1
        x = draw(setting, seed, mutant.sampler(setting), mutant.n_steps(setting))
        assert min(p_values(x, *setting.expected()).values()) < ALPHA, f"not caught in setting {seed}: {setting}"
    assert shown >= 6


def test_power_the_law_of_the_target_is_not_the_law_of_the_chain() -> None:
    """T/k instead of T/(k(1 − ηk/2)) is rejected wherever the two differ by 10 %."""
    shown = [(i, s) for i, s in enumerate(SETTINGS) if s.var is None or s.forgotten]
    shown = [(i, s) for i, s in shown if visible((0.0, s.temperature / s.curvature), s.expected())]
    assert len(shown) >= 6
    for seed, s in shown:
        assert p_values(draw(s, seed), 0.0, s.temperature / s.curvature)["variance"] < ALPHA


@dataclass(frozen=True)
class SharedNoise(Langevin):
    """A mistake that no test of one coordinate can see: every coordinate of a chain gets the same noise."""

    def step(self, x: Tensor, grad: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn((len(x),) + (1,) * (x.ndim - 1), generator=generator, dtype=x.dtype).expand_as(x)
        return langevin_step(x, grad, self.step_size, self.sigma, noise)


def test_power_noise_shared_between_coordinates_is_caught() -> None:
    shown = [(i, s) for i, s in enumerate(SETTINGS) if math.prod(s.shape) > 1 and s.n_steps > 5]
    assert len(shown) >= 5
    for seed, s in shown:
        x = draw(s, seed, SharedNoise(s.step_size, temperature=s.temperature))
        assert p_values(x, *s.expected())["independence"] < ALPHA, s


def test_double_well_is_sampled_with_small_steps() -> None:
    """False alarm: 1e-6, a KS test at 1e-7, alarming at a distance of 0.045; η = 0.004 itself causes less than 0.01.

    Power: shares of the wells that are wrong by 0.07 are caught.
    """
    g = torch.Generator().manual_seed(0)
    well = lambda x: double_well(x, barrier=1.0, tilt=0.25)  # noqa: E731
    x = Langevin(0.004, temperature=0.7).sample(well, uniform_init(4096, (1,), generator=g), n_steps=2500, generator=g)
    grid = make_grid([(-4, 4)], 4000)
    cdf = boltzmann_probs(well(grid.points), 0.7).cumsum(0)
    u = torch.sort(cdf[((x.double() + 4) / 8 * 4000).long().clamp(0, 3999)].flatten()).values.numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-7


# Annealing


HOT = Langevin(0.1, n_steps=12, noise_scale=0.1, noise_start=0.8, anneal_steps=3)


def test_annealed_noise_by_hand() -> None:
    """Three halvings from 0.8 to 0.1, and 0.1 from there on."""
    assert HOT.sigma_at(torch.tensor([0, 1, 2, 3, 4, 1000])).tolist() == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.1, 0.1])
    assert (
        HOT.sigma_at(torch.tensor(1)).ndim == 0 and HOT.sigma == 0.1 and HOT.implied_temperature == pytest.approx(0.05)
    )
    assert (Langevin(0.1, noise_scale=0.3).sigma_at(torch.arange(4)) == torch.tensor(0.3)).all()


@pytest.mark.parametrize("kind", ["points", "images"])
@pytest.mark.parametrize("ages", ["young", "old", "mixed"])
def test_an_annealed_chain_is_the_loop_with_its_noise(kind: str, ages: str, make_generator: Factory) -> None:
    """Each chain has the noise of its own age; of images, the fast engine agrees within rounding."""
    shape, n = (2,) if kind == "points" else (1, 12, 12), 7
    net = EnergyMLP(generator=make_generator(0)) if kind == "points" else EnergyCNN(shape, 4, 8, make_generator(0))
    x = uniform_init(n, shape, generator=make_generator(1))
    old = {"young": 0, "old": 5, "mixed": torch.arange(n)}[ages]
    chain = HOT.run(net, x, generator=make_generator(2), ages=old, trajectory=13)
    g, y = make_generator(2), x
    for k in range(12):
        e = net(y.requires_grad_(True)).sum()
        (grad,) = torch.autograd.grad(e, y)
        at = torch.as_tensor(old).expand(n) + k
        sigma = torch.tensor([0.8 * 0.5 ** min(3, a) for a in at.tolist()]).view(-1, *[1] * len(shape))
        y = (y - 0.1 * grad + sigma * torch.randn(y.shape, generator=g)).detach()
        assert chain.trajectory is not None
        torch.testing.assert_close(chain.trajectory[k + 1], y, rtol=1e-4, atol=1e-5)


def test_an_annealed_chain_goes_on_where_it_was(make_generator: Factory, device: torch.device) -> None:
    x = torch.ones(16, 3, device=device)
    g = make_generator(1, device)
    first = HOT.sample(spring, x, generator=make_generator(1, device))
    halves = HOT.sample(spring, HOT.sample(spring, x, 2, g), 10, g, ages=2)
    assert torch.equal(first, halves)
    cold = dataclasses.replace(HOT, noise_start=None, anneal_steps=0)
    old = HOT.sample(spring, x, generator=make_generator(3, device), ages=3)
    torch.testing.assert_close(old, cold.sample(spring, x, generator=make_generator(3, device)), rtol=1e-6, atol=1e-7)


def test_a_subclass_that_moves_in_its_own_way_can_anneal(make_generator: Factory) -> None:
    class Same(Langevin):
        def step(
            self, x: Tensor, grad: Tensor, generator: torch.Generator | None = None, sigma: Tensor | None = None
        ) -> Tensor:
            return super().step(x, grad, generator, sigma)

    own, x = Same(**vars(HOT)), torch.ones(16, 3)
    expected = HOT.run(spring, x, generator=make_generator(4), diagnostics=True)
    found = own.run(spring, x, generator=make_generator(4), diagnostics=True)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-6, atol=1e-6)
    assert expected.diagnostics is not None and found.diagnostics is not None
    torch.testing.assert_close(found.diagnostics.drift_to_noise, expected.diagnostics.drift_to_noise, rtol=1e-5, atol=0)
    ratio = 0.1 * torch.ones(3).norm() / (0.8 * math.sqrt(3))  # of the first step: η‖x‖/(σ√d)
    assert expected.diagnostics.drift_to_noise[0] == pytest.approx(float(ratio))


@pytest.mark.parametrize("n_steps", [1, 3, 8, 12])
def test_annealed_chains_on_a_spring_have_their_exact_variance(n_steps: int) -> None:
    """Shrink by 1 − ηk, add the variance of the hour. False alarm 8e-9: four settings at six standard errors.

    Power: a schedule that is one step late has another variance by at least 12 %, twelve standard errors.
    """
    hot = Langevin(0.2, n_steps, noise_scale=0.1, noise_start=0.8, anneal_steps=12)
    expected, late = 0.0, 0.0
    for k in range(n_steps):
        expected = 0.8**2 * expected + (0.8 * 0.125 ** min(1.0, k / 12)) ** 2
        late = 0.8**2 * late + (0.8 * 0.125 ** min(1.0, max(0, k - 1) / 12)) ** 2
    x = hot.sample(spring, torch.zeros(20_000, 1), generator=torch.Generator().manual_seed(6)).double()
    limit = 6 * math.sqrt(2 / 20_000)
    assert abs(x.square().mean().item() / expected - 1) < limit
    assert n_steps == 1 or late / expected - 1 > 2 * limit


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise_start": 0.5}, "noise_start and anneal_steps > 0"),
        ({"anneal_steps": 5}, "noise_start and anneal_steps > 0"),
        ({"noise_start": 0.5, "anneal_steps": 2.5}, "whole number"),
        ({"noise_start": 0.5, "anneal_steps": -1}, "whole number"),
        ({"noise_start": 0.05, "anneal_steps": 5}, "noise_start must be finite and at least"),
        ({"noise_start": math.nan, "anneal_steps": 5}, "noise_start must be finite and at least"),
        ({"noise_start": math.inf, "anneal_steps": 5}, "noise_start must be finite and at least"),
    ],
)
def test_annealing_settings_that_do_not_fit(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Langevin(0.1, noise_scale=0.1, **settings)
    with pytest.raises(ValueError, match="noise_start"):
        Langevin(0.1, temperature=0.0, noise_start=0.1, anneal_steps=3)


@pytest.mark.parametrize(
    "ages", [-1, 1.5, torch.zeros(4), torch.zeros(3, dtype=torch.long), torch.zeros(4, 1, dtype=torch.long)]
)
def test_ages_that_do_not_fit(ages: Any) -> None:
    with pytest.raises(ValueError, match="ages must be"):
        HOT.sample(spring, torch.ones(4, 1), ages=ages)


# Limiting cases


def test_no_temperature_is_plain_descent(make_generator: Factory) -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    sampler = Langevin(0.1, n_steps=30, temperature=0.0)
    y = sampler.sample(spring, x, generator=make_generator(1))
    torch.testing.assert_close(y, 0.9**30 * x, rtol=1e-13, atol=0)
    assert torch.equal(y, sampler.sample(spring, x, generator=make_generator(2)))
    assert torch.equal(y, dataclasses.replace(sampler, temperature=None, noise_scale=0.0).sample(spring, x))


def test_no_steps_return_a_copy() -> None:
    x = torch.ones(3, 2)
    chain = Langevin(0.1).run(spring, x, n_steps=0, trajectory=5, diagnostics=True)
    assert torch.equal(chain.x, x) and chain.x.data_ptr() != x.data_ptr() and chain.n_steps == 0
    assert chain.trajectory is not None and chain.trajectory.shape == (1, 3, 2)
    assert chain.diagnostics is not None and len(chain.diagnostics.energy) == 0


def test_a_flat_energy_leaves_pure_diffusion(make_generator: Factory) -> None:
    sampler, x = Langevin(0.5, n_steps=4), torch.zeros(5, 2)
    y = sampler.sample(lambda x: 0 * x.sum(1), x, generator=make_generator(3))
    g = make_generator(3)
    torch.testing.assert_close(y, sum(torch.randn(5, 2, generator=g) for _ in range(4)))


# Options: exactly what they say, against a loop written by hand


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 8, 8)])
@pytest.mark.parametrize("grad_clip", [None, 0.2])
@pytest.mark.parametrize("bounds", [None, (-0.5, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_a_loop_by_hand(
    shape: tuple[int, ...],
    grad_clip: float | None,
    bounds: tuple[float, float] | None,
    dtype: torch.dtype,
    make_generator: Factory,
    device: torch.device,
) -> None:
    """Bit for bit, under the same noise, with the gradient of double_well written down by hand."""
    x_init = torch.linspace(-1, 1, 6 * math.prod(shape), dtype=dtype, device=device).reshape(6, *shape)
    sampler = Langevin(0.05, 7, temperature=0.3, grad_clip=grad_clip, bounds=bounds)
    energy = lambda x: (x.flatten(1).square().square() / 4 - x.flatten(1)).sum(1)  # noqa: E731
    chain = sampler.run(energy, x_init, generator=make_generator(5, device), trajectory=8)
    g, x, sigma = make_generator(5, device), x_init.clone(), math.sqrt(2 * 0.05 * 0.3)
    states = [x]
    for _ in range(7):
        grad = torch.autograd.functional.jacobian(lambda y: energy(y).sum(), x)
        if grad_clip is not None:
            grad = torch.where(grad > grad_clip, grad_clip, torch.where(grad < -grad_clip, -grad_clip, grad))
        x = x - 0.05 * grad + sigma * torch.randn(x.shape, generator=g, dtype=dtype, device=device)
        if bounds is not None:
            x = torch.where(x > bounds[1], bounds[1], torch.where(x < bounds[0], bounds[0], x))
        states.append(x)
    assert torch.equal(chain.x, x) and chain.x.device.type == device.type and chain.x.dtype == dtype
    assert chain.trajectory is not None and torch.equal(chain.trajectory, torch.stack(states))


@dataclass(frozen=True)
class Scripted(Langevin):
    """The same sampler with the noise handed to it."""

    noise: Any = None

    def step(self, x: Tensor, grad: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = langevin_step(x, self.clip(grad), self.step_size, self.sigma, next(self.noise))
        return x if self.bounds is None else x.clamp(*self.bounds)


@pytest.mark.parametrize("kind", ["points", "images"])
def test_a_batch_is_its_chains_one_by_one(kind: str, make_generator: Factory) -> None:
    shape = (2,) if kind == "points" else (1, 8, 8)
    net = (EnergyMLP if kind == "points" else lambda generator: EnergyCNN(shape, generator=generator))(
        generator=make_generator(0)
    ).double()
    x = uniform_init(4, shape, generator=make_generator(1)).double()
    noise = torch.randn(9, 4, *shape, generator=make_generator(2), dtype=torch.float64)

    def sample(rows: slice) -> Tensor:
        script: Iterator[Tensor] = iter(noise[:, rows])
        return Scripted(0.3, 9, temperature=0.1, grad_clip=0.5, bounds=(-1, 1), noise=script).sample(net, x[rows])

    one_by_one = torch.cat([sample(slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(sample(slice(None)), one_by_one, rtol=1e-10, atol=1e-10)


# Randomness


def test_a_generator_decides_everything(make_generator: Factory, device: torch.device) -> None:
    sampler, x = Langevin(0.1, n_steps=5), torch.zeros(4, 3, device=device)
    before = torch.get_rng_state()
    first = sampler.sample(spring, x, generator=make_generator(1, device))
    assert torch.equal(first, sampler.sample(spring, x, generator=make_generator(1, device)))
    assert not torch.equal(first, sampler.sample(spring, x, generator=make_generator(2, device)))
    g = make_generator(1, device)
    halves = sampler.sample(spring, sampler.sample(spring, x, n_steps=2, generator=g), n_steps=3, generator=g)
    assert torch.equal(first, halves), "a chain interrupted is the same chain"
    chain = sampler.run(spring, x, generator=make_generator(1, device), trajectory=3, diagnostics=True)
    assert torch.equal(first, chain.x), "looking does not disturb"
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not used"


def test_uniform_init(make_generator: Factory, device: torch.device) -> None:
    """False alarm: 1e-7, a KS test of 8,000 numbers. Power: a range wrong by 5 % is caught."""
    x = uniform_init(2000, (1, 2, 2), (-3.0, 1.0), make_generator(0, device))
    assert x.shape == (2000, 1, 2, 2) and x.device.type == device.type and x.dtype == torch.float32
    assert x.min() >= -3 and x.max() <= 1
    assert stats.kstest(((x.cpu().double().flatten() + 3) / 4).numpy(), "uniform").pvalue > 1e-7
    assert uniform_init(2, (3,)).abs().max() <= 1
    with pytest.raises(ValueError, match="low < high"):
        uniform_init(2, (3,), (1.0, -1.0))


# What a chain reports


@pytest.mark.parametrize("n_steps", [1, 7, 199, 200, 201, 399, 1000])
def test_diagnostics_take_bounded_memory(n_steps: int) -> None:
    d = Langevin(0.1, n_steps).run(spring, torch.ones(2, 1), diagnostics=True).diagnostics
    assert d is not None
    sizes = {len(field) for field in d[:-1]}
    assert sizes == {n_steps} if n_steps <= 200 else len(sizes) == 1 and 100 <= sizes.pop() <= 200
    assert d.steps[0] == 0 and d.steps[-1] < n_steps and (d.steps.diff() == d.steps.diff()[:1]).all()
    assert all(torch.isfinite(field).all() for field in d[:-1])


def test_diagnostics_are_what_they_say(make_generator: Factory) -> None:
    x = torch.tensor([[3.0, 0.1], [-0.2, 0.5]], dtype=torch.float64)
    sampler = Langevin(0.1, 1, noise_scale=0.2, grad_clip=1.0, bounds=(-0.5, 0.4))
    chain = sampler.run(spring, x, generator=make_generator(0), diagnostics=True)
    d = chain.diagnostics
    assert d is not None
    assert d.energy.item() == pytest.approx((9.01 + 0.29) / 4)
    assert d.grad_norm.item() == pytest.approx((math.sqrt(9.01) + math.sqrt(0.29)) / 2)
    assert d.clip_rate.item() == 0.25, "one coordinate of four is larger than 1"
    on_bounds = (chain.x == -0.5) | (chain.x == 0.4)
    assert d.saturation_rate.item() == on_bounds.double().mean().item() > 0
    drift = 0.1 * (math.sqrt(1.01) + math.sqrt(0.29)) / 2
    assert d.drift_to_noise.item() == pytest.approx(drift / (0.2 * math.sqrt(2)))
    assert d.implied_temperature == chain.implied_temperature == pytest.approx(0.2)
    still = Langevin(0.1, 1, temperature=0.0).run(spring, x, diagnostics=True).diagnostics
    assert still is not None and still.drift_to_noise.item() == math.inf, "no noise: nothing but drift"
    assert still.clip_rate.item() == still.saturation_rate.item() == 0


@pytest.mark.parametrize("n_steps", [1, 2, 10, 137])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 500])
def test_trajectory_holds_the_first_and_the_last_state(n_steps: int, count: int) -> None:
    x = torch.ones(2, 3)
    chain = Langevin(0.1, n_steps).run(spring, x, trajectory=count)
    assert chain.trajectory is not None and chain.trajectory_steps is not None
    assert torch.equal(chain.trajectory[0], x) and torch.equal(chain.trajectory[-1], chain.x)
    assert chain.trajectory_steps[0] == 0 and chain.trajectory_steps[-1] == n_steps
    assert (chain.trajectory_steps.diff() > 0).all()
    assert len(chain.trajectory) == len(chain.trajectory_steps) == min(max(2, count), n_steps + 1)
    assert Langevin(0.1, n_steps).run(spring, x).trajectory is None


# Leaves no trace


def battered_network(g: torch.Generator) -> nn.Module:
    """Modes, flags and gradients as a training loop might have left them."""
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 1), nn.Flatten(0))
    net.train()
    net[3].eval()
    net[0].weight.requires_grad_(False)
    net[4].weight.grad = torch.randn(1, 8, generator=g)
    return net


def portrait(net: nn.Module) -> tuple[Any, ...]:
    flags = [(n, p.requires_grad, None if p.grad is None else p.grad.tolist()) for n, p in net.named_parameters()]
    modes = [(n, m.training) for n, m in net.named_modules()]
    return flags, modes, {k: v.tolist() for k, v in copy.deepcopy(net.state_dict()).items()}


class Failing(nn.Module):
    """A network that fails at its third evaluation, in one of several ways."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how, self.calls = net, how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        e = self.net(x)
        if self.calls < 3:
            return e
        if self.how == "raises":
            raise KeyboardInterrupt
        return e[:, None] if self.how == "shape" else e * math.nan


@pytest.mark.parametrize("how", ["works", "raises", "shape", "nan"])
def test_sampling_leaves_no_trace(how: str, make_generator: Factory) -> None:
    net = battered_network(make_generator(0))
    energy = net if how == "works" else Failing(net, how)
    x = torch.ones(4, 2, requires_grad=True)
    before, grad_mode = portrait(energy), torch.is_grad_enabled()
    errors = {"raises": KeyboardInterrupt, "shape": EnergyShapeError, "nan": NonFiniteError}
    if how == "works":
        y = Langevin(0.1, 5).sample(energy, x, generator=make_generator(1))
        assert not y.requires_grad and y.grad_fn is None
    else:
        with pytest.raises(errors[how]):
            Langevin(0.1, 5).run(energy, x, generator=make_generator(1), trajectory=3, diagnostics=True)
    assert portrait(energy) == before
    assert torch.equal(x, torch.ones(4, 2)) and x.grad is None and x.requires_grad
    assert torch.is_grad_enabled() == grad_mode


@pytest.mark.parametrize("caller", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(caller: Callable[[], Any], make_generator: Factory) -> None:
    net = EnergyMLP(generator=make_generator(0))
    expected = Langevin(0.1, 4).sample(net, torch.ones(3, 2), generator=make_generator(1))
    with caller():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        y = Langevin(0.1, 4).sample(net, torch.ones(3, 2), generator=make_generator(1))
        assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert torch.equal(y, expected) and not y.requires_grad and not y.is_inference(), "an ordinary tensor"


def test_memory_does_not_grow_with_the_steps(make_generator: Factory) -> None:
    """At no time do more than two states live, whatever the number of steps, diagnostics included."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def energy(x: Tensor) -> Tensor:
        nonlocal most
        alive.append(weakref.ref(x))
        most = max(most, sum(ref() is not None for ref in alive))
        return x.square().sum(1)

    Langevin(0.1, 100, grad_clip=1.0, bounds=(-1, 1)).run(energy, torch.ones(2, 2), diagnostics=True)
    assert len(alive) == 100 and most <= 2


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.WAITS
        return func(*args, **(kwargs or {}))


def test_the_counter_of_reads_sees_them() -> None:
    with Reads() as reads:
        x = torch.ones(3)
        assert x.sum().item() == 3 and bool((x > 0).all())
    assert reads.count == 2


def test_the_loop_reads_nothing_from_the_device(make_generator: Factory) -> None:
    net = EnergyMLP(generator=make_generator(0))
    sampler = Langevin(0.1, grad_clip=1.0, bounds=(-1, 1))
    with Reads() as reads:
        sampler.run(net, torch.ones(4, 2), n_steps=40, trajectory=5, diagnostics=True)
    assert reads.count == 0


@pytest.mark.cuda
def test_the_loop_never_waits_for_cuda(make_generator: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    net = EnergyCNN((1, 28, 28), generator=make_generator(0)).cuda()
    sampler, g = Langevin(0.1, grad_clip=1.0, bounds=(-1, 1)), make_generator(1, "cuda")
    x = uniform_init(8, (1, 28, 28), generator=g)
    read = langevin._Alarm.check

    def check(self: Any, x: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("default")  # the one read, after the loop
        read(self, x)

    monkeypatch.setattr(langevin._Alarm, "check", check)
    sampler.run(net, x, n_steps=2, generator=g)  # libraries initialise themselves
    try:
        torch.cuda.set_sync_debug_mode("error")
        sampler.run(net, x, n_steps=20, generator=g, trajectory=5, diagnostics=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_cuda_memory_is_flat(make_generator: Factory) -> None:
    net = EnergyCNN((1, 28, 28), generator=make_generator(0)).cuda()
    x = uniform_init(64, (1, 28, 28), generator=make_generator(1, "cuda"))
    peaks = []
    for n in (3, 10, 100):
        torch.cuda.reset_peak_memory_stats()
        Langevin(0.1).run(net, x, n_steps=n, generator=make_generator(2, "cuda"))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= peaks[1] + 4096


# Errors: one line each, nothing lost


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, "step_size must be a finite number > 0, got 0.0"),
        ({"step_size": -1.0}, "step_size must be a finite number > 0, got -1.0"),
        ({"step_size": math.nan}, "step_size"),
        ({"step_size": math.inf}, "step_size"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"noise_scale": -0.1}, "noise_scale must be a finite number >= 0, got -0.1"),
        ({"temperature": 1.0, "noise_scale": 0.1}, "either temperature or noise_scale, not both"),
        ({"temperature": 0.0, "noise_scale": 0.0}, "either temperature or noise_scale, not both"),
        ({"n_steps": -1}, "n_steps must be a whole number >= 0, got -1"),
        ({"n_steps": 2.5}, "n_steps must be a whole number"),
        ({"grad_clip": 0.0}, "grad_clip must be > 0"),
        ({"grad_clip": -1.0}, "grad_clip must be > 0"),
        ({"bounds": (1.0, -1.0)}, "low < high"),
        ({"bounds": (1.0, 1.0)}, "low < high"),
        ({"bounds": (math.nan, 1.0)}, "low < high"),
        ({"bounds": (1.0,)}, "low < high"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Langevin(**({"step_size": 0.1} | settings))
    assert "\n" not in str(error.value)


def test_settings_are_immutable() -> None:
    sampler = Langevin(0.1, bounds=(-1, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.step_size = 0.2  # type: ignore[misc]
    assert sampler == Langevin(0.1, bounds=(-1, 1)) and hash(sampler) == hash(Langevin(0.1, bounds=(-1, 1)))


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(3),
        torch.tensor(1.0),
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(0, 3),
        torch.ones(3, 0),
        torch.ones(2, 3, dtype=torch.complex64),
        [[1.0, 2.0]],
    ],
)
def test_unusable_starts(x: Any) -> None:
    with pytest.raises(ValueError, match=r"x_init must be a non-empty floating-point tensor \(B, \*shape\), got"):
        Langevin(0.1).sample(spring, x)


@pytest.mark.parametrize("wrong", [{"n_steps": -1}, {"n_steps": 1.5}, {"trajectory": -2}])
def test_impossible_requests(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a whole number >= 0"):
        Langevin(0.1).run(spring, torch.ones(2, 1), **wrong)


@pytest.mark.parametrize("name", ["cuda:0", "mps"])
def test_generator_of_another_device(name: str) -> None:
    elsewhere: Any = SimpleNamespace(device=torch.device(name))
    with pytest.raises(ValueError, match=f"generator is on {name}, x_init on cpu; they must be on one device"):
        Langevin(0.1).sample(spring, torch.ones(2, 1), generator=elsewhere)


@pytest.mark.cuda
def test_generator_of_the_cpu_with_a_start_on_cuda(make_generator: Factory) -> None:
    with pytest.raises(ValueError, match="they must be on one device"):
        Langevin(0.1).sample(spring, torch.ones(2, 1, device="cuda"), generator=make_generator(0))


@pytest.mark.parametrize(
    "energy",
    [lambda x: x.square().sum(1, keepdim=True), lambda x: x.square().sum(), lambda x: x.square(), lambda x: None],
    ids=["(B, 1)", "scalar", "(B, 3)", "None"],
)
def test_energies_of_the_wrong_shape(energy: Any) -> None:
    with pytest.raises(EnergyShapeError, match=r"expected \(4,\)"):
        Langevin(0.1).sample(energy, torch.ones(4, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n_steps", [0, 5])
def test_a_bad_number_in_the_start(bad: float, n_steps: int) -> None:
    x = torch.ones(3, 2)
    x[1, 1] = bad
    with pytest.raises(NonFiniteError, match="x_init holds NaN or infinite values"):
        Langevin(0.1, n_steps, bounds=(-1, 1)).sample(spring, x)


def test_a_blow_up_names_its_first_step() -> None:
    """ηk = 3 doubles x at every step: 2^k exceeds what a float32 energy can hold at a step that can be predicted."""
    x = torch.ones(1, 1)
    step = next(k for k in range(200) if not torch.isfinite(spring(x * 2.0**k)).all())
    with pytest.raises(NonFiniteError, match=f"energy became NaN or infinite at step {step} of 500; try a smaller"):
        Langevin(3.0, 500, temperature=0.0).sample(spring, x)
    assert torch.isfinite(Langevin(3.0, step, temperature=0.0).sample(spring, x)).all()


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize(("what", "bad"), [("energy", math.nan), ("energy", math.inf), ("gradient", math.inf)])
def test_bounds_and_clipping_hide_nothing(when: int, what: str, bad: float) -> None:
    """Clamped, an infinite gradient would leave a harmless number between the bounds."""
    calls = 0

    def energy(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        e = x.sum(1)
        if calls == when + 1:
            e = e + bad if what == "energy" else e + (x - x.detach()).sqrt().sum(1)  # slope 1/(2·0)
        return e

    with pytest.raises(NonFiniteError, match=f"{what} became NaN or infinite at step {when} of 6"):
        Langevin(0.1, 6, grad_clip=0.5, bounds=(-1, 1)).sample(energy, torch.zeros(4, 2))


def test_energy_and_gradient_bad_at_once_is_the_energys_fault() -> None:
    with pytest.raises(NonFiniteError, match="the energy became NaN or infinite at step 0 of 2"):
        Langevin(0.1, 2).sample(lambda x: math.nan * x.sum(1), torch.ones(3, 1))


def test_one_bad_chain_of_many_is_enough() -> None:
    energy = lambda x: torch.where(x[:, 0] > 9, math.nan, x.square().sum(1))  # noqa: E731
    x = torch.zeros(1000, 2)
    x[777, 0] = 10.0
    with pytest.raises(NonFiniteError, match="at step 0 of 3"):
        Langevin(0.1, 3).sample(energy, x)


def test_a_last_step_into_the_void_is_seen() -> None:
    energy = lambda x: (2e38 * x).sum(1)  # noqa: E731
    with pytest.raises(NonFiniteError, match="state became NaN or infinite at step 1 of 1"):
        Langevin(10.0, 1, temperature=0.0).sample(energy, torch.zeros(1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_raises_no_false_alarm(dtype: torch.dtype) -> None:
    """The sum of 512 energies of 1,000 exceeds the largest float16; each of them is fine."""
    x = torch.ones(512, 2, dtype=dtype)
    chain = Langevin(1e-4, 5).run(lambda x: 500 * x.square().sum(1), x, diagnostics=True)
    assert chain.x.dtype == dtype and chain.diagnostics is not None
    assert chain.diagnostics.energy[0] == pytest.approx(1000, rel=1e-2)


@pytest.mark.cuda
def test_errors_on_cuda(make_generator: Factory) -> None:
    with pytest.raises(NonFiniteError, match="energy became NaN or infinite at step"):
        Langevin(3.0, 500).sample(spring, torch.ones(2, 1, device="cuda"), generator=make_generator(0, "cuda"))


def test_small_functions_refuse_what_has_no_meaning():
    for call in (
        lambda: noise_scale_for(0.1, -1.0),
        lambda: noise_scale_for(0.0, 1.0),
        lambda: implied_temperature(0.0, 1.0),
        lambda: quadratic_law(1.0, -0.1, 1.0, n_steps=3),
        lambda: quadratic_law(1.0, 0.1, -1.0),
        lambda: uniform_init(3, (2,), (-math.inf, 1.0)),
    ):
        with pytest.raises(ValueError, match=r"step_size|temperature|bounds"):
            call()
