"""Probabilities from energies: closed forms, limiting cases, properties, and what must be refused.

Everything here is deterministic: random inputs come from fixed generators and each identity holds for all of them, so
no test can fail by bad luck. Tolerances are some hundred roundings of float64 unless a comment says why they are wider.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor, nn

from ebm_lit.boltzmann import (
    ConvergenceError,
    Grid,
    Thermodynamics,
    boltzmann_probs,
    double_well,
    log_density,
    log_partition,
    make_grid,
    quadratic,
    thermodynamics,
)
from ebm_lit.data import toy

Factory = Callable[..., torch.Generator]
F64 = torch.float64


def gaussian(precision: Tensor) -> Callable[[Tensor], Tensor]:
    """E(x) = xᵀAx/2."""
    return lambda x: (x @ precision.to(x) * x).sum(1) / 2


def box_of(low: float, high: float) -> Callable[[Tensor], Tensor]:
    """Zero between low and high, +inf outside: the uniform density."""
    return lambda x: torch.where((x > low) & (x < high), 0.0, math.inf).sum(1).to(x.dtype)


# Discrete states


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 7.0, 1e5])
@pytest.mark.parametrize("gap", [0.0, 0.2, 1.0, 30.0])
def test_two_states_are_a_logistic_function_of_gap_over_temperature(gap: float, temperature: float) -> None:
    p = boltzmann_probs(torch.tensor([3.0, 3.0 + gap], dtype=F64), temperature)
    assert p[0].item() == pytest.approx(1 / (1 + math.exp(-gap / temperature)), rel=1e-12)
    assert p[1].item() == pytest.approx(1 / (1 + math.exp(min(gap / temperature, 700))), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_equal_softmax_keep_the_dtype_and_sum_to_one(dtype: torch.dtype, make_generator: Factory) -> None:
    e = 20 * torch.randn(50, 4, 9, generator=make_generator(0), dtype=dtype)
    for temperature in (0.1, 1.0, 10.0):
        p = boltzmann_probs(e, temperature)
        assert p.dtype == dtype and p.shape == e.shape
        tolerance = 1e-12 if dtype == F64 else 5e-4  # exponents up to a thousand, rounded to 1e-4 in float32
        assert torch.allclose(p, torch.softmax(-e / temperature, -1), rtol=tolerance, atol=1e-30)
        assert torch.allclose(p.sum(-1), torch.ones(50, 4, dtype=dtype), atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("offset", [-1e30, -1e6, -1000.0, 1000.0, 1e6, 1e30])
def test_probabilities_stay_finite_whatever_the_size_of_the_energies(offset: float) -> None:
    e = torch.tensor([0.0, 1.0, 2.5], dtype=F64) + offset
    p = boltzmann_probs(e)
    assert torch.isfinite(p).all() and p.sum().item() == pytest.approx(1, abs=1e-14)
    if abs(offset) <= 1e6:  # an energy of 1e6 is rounded to 1e-10
        assert torch.allclose(p, boltzmann_probs(e - offset), rtol=1e-9)


def test_ratios_of_probabilities_need_no_partition_function(make_generator: Factory) -> None:
    e = torch.randn(30, 6, generator=make_generator(1), dtype=F64)
    p, few = boltzmann_probs(e, 0.7), boltzmann_probs(e[:, :2], 0.7)  # other states change Z, not the ratio
    assert torch.allclose(p[:, 0] / p[:, 1], torch.exp(-(e[:, 0] - e[:, 1]) / 0.7), rtol=1e-12)
    assert torch.allclose(p[:, 0] / p[:, 1], few[:, 0] / few[:, 1], rtol=1e-12)


def test_cold_shares_the_lowest_states_and_hot_shares_all_possible_ones() -> None:
    e = torch.tensor([1.0, 0.0, 5.0, 0.0, math.inf], dtype=F64)
    assert torch.equal(boltzmann_probs(e, 1e-3), torch.tensor([0, 0.5, 0, 0.5, 0], dtype=F64))
    hot = boltzmann_probs(e, 1e9)
    assert torch.allclose(hot, torch.tensor([0.25, 0.25, 0.25, 0.25, 0], dtype=F64), atol=1e-8) and hot[4] == 0


def test_the_lower_energy_is_the_more_likely_one_at_every_temperature(make_generator: Factory) -> None:
    e = torch.randn(100, 5, generator=make_generator(2), dtype=F64)
    for temperature in (0.1, 1.0, 50.0):
        p = boltzmann_probs(e, temperature)
        assert torch.equal(p.argmax(1), e.argmin(1)) and torch.equal(p.argmin(1), e.argmax(1))


def test_integer_energies_and_gradients() -> None:
    assert boltzmann_probs(torch.tensor([0, 1])).sum().item() == pytest.approx(1, abs=1e-6)
    e = torch.tensor([0.3, -0.2, 1.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: boltzmann_probs(e, 0.7), (e,))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_that_are_not_positive_numbers_are_refused_everywhere(temperature: float) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: boltzmann_probs(torch.zeros(2), temperature),
        lambda: log_partition(quadratic, [(-8, 8)], temperature),
        lambda: thermodynamics(quadratic, [(-8, 8)], temperature),
        lambda: log_density(quadratic, torch.zeros(2, 1), 0.0, temperature),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"temperature must be positive and finite, got"):
            call()


@pytest.mark.parametrize("row", [[0.0, math.nan], [-math.inf, 0.0], [math.inf, math.inf]])
def test_energies_without_a_finite_minimum_are_refused(row: list[float]) -> None:
    with pytest.raises(FloatingPointError, match="finite minimum"):
        boltzmann_probs(torch.tensor([[0.0, 1.0], row]))


# Energies


def test_quadratic_and_double_well_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert quadratic(x).tolist() == [12.5, 0.0] and quadratic(x, 2.0).tolist() == [25.0, 0.0]
    x = torch.tensor([[0.0], [1.0], [-1.0], [2.0]])
    assert double_well(x).tolist() == [1.0, 0.0, 0.0, 9.0]
    assert double_well(x, barrier=2.0, tilt=0.5).tolist() == [2.0, 0.5, -0.5, 19.0]
    assert double_well(torch.tensor([[1.0, 2.0, 1.0]])).tolist() == [2.5]  # other coordinates are springs


@pytest.mark.parametrize("energy", [quadratic, double_well])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energies_take_any_shape_and_keep_dtype_and_device(
    energy: Any, dtype: torch.dtype, device: torch.device
) -> None:
    for shape in ((5, 1), (5, 2), (5, 1, 8, 8), (0, 3)):
        x = torch.ones(shape, dtype=dtype, device=device)
        e = energy(x)
        assert e.shape == shape[:1] and e.dtype == dtype and e.device.type == device.type
        assert torch.equal(e, energy(x.flatten(1)))


@pytest.mark.parametrize("energy", [quadratic, double_well])
def test_energies_have_the_gradients_they_should(energy: Any, make_generator: Factory) -> None:
    x = torch.randn(3, 4, generator=make_generator(3), dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(energy, (x,))
    with pytest.raises(ValueError, match=r"x must have shape \(B, \*shape\), got \(5,\)"):
        energy(torch.zeros(5))


# Grids


def test_a_grid_by_hand() -> None:
    grid = make_grid([(0, 1), (0, 3)], (2, 3))
    assert isinstance(grid, Grid) and grid.shape == (2, 3) and grid.cell_volume == 0.5
    assert grid.points.dtype == F64 and grid.points.tolist() == [[x, y] for x in (0.25, 0.75) for y in (0.5, 1.5, 2.5)]
    with pytest.raises(AttributeError):
        grid.cell_volume = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "bounds", [[(-1, 1)], [(-1.5, 2), (0, 1)], ((-3, 1), (-1, 2), (5, 6)), np.array([[-1, 1], [0, 2]])]
)
def test_cells_fill_the_box_and_midpoints_lie_inside(bounds: Any) -> None:
    grid = make_grid(bounds, 7)
    low, high = torch.as_tensor(np.asarray(bounds, dtype=float)).T
    assert grid.points.shape == (7 ** len(bounds), len(bounds)) and grid.shape == (7,) * len(bounds)
    assert grid.cell_volume * len(grid.points) == pytest.approx((high - low).prod().item(), rel=1e-14)
    assert (grid.points > low).all() and (grid.points < high).all()
    assert torch.allclose(grid.points.mean(0), (low + high) / 2, atol=1e-14)


@pytest.mark.parametrize(
    "bounds", [(-8, 8), [(-8, 8, 3)], [], [(1,)], [None], 5, [(1, 1)], [(2, 1)], [(0, math.inf)], [(math.nan, 1)]]
)
def test_bad_bounds_are_refused_everywhere(bounds: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: make_grid(bounds, 5),
        lambda: log_partition(quadratic, bounds),
        lambda: thermodynamics(quadratic, bounds),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="bounds"):
            call()


@pytest.mark.parametrize("n", [0, -3, (4,), (4, 0), (4, 4, 4)])
def test_bad_counts_are_refused(n: Any) -> None:
    with pytest.raises(ValueError, match="n must be a positive count for each of the 2 axes"):
        make_grid([(0, 1), (0, 1)], n)


# log Z


@pytest.mark.parametrize("temperature", [0.02, 1.0, 25.0])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_log_z_of_random_correlated_gaussians(d: int, temperature: float, make_generator: Factory) -> None:
    g = make_generator(d)
    for _ in range(3):
        m = torch.randn(d, d, generator=g, dtype=F64)
        precision = m @ m.T / d + torch.eye(d, dtype=F64)
        std = (temperature * torch.linalg.inv(precision).diagonal()).sqrt().tolist()
        value = log_partition(gaussian(precision), [(-9 * s, 9 * s) for s in std], temperature)
        exact = d / 2 * math.log(2 * math.pi * temperature) - torch.logdet(precision).item() / 2
        assert value == pytest.approx(exact, abs=1e-10)


def test_log_z_in_four_dimensions_and_not_in_ten() -> None:
    value = log_partition(quadratic, [(-8, 8)] * 4)
    assert value == pytest.approx(2 * math.log(2 * math.pi), abs=1e-10)
    with pytest.raises(ConvergenceError, match=r"d = 10: no grid was small enough, and the next grid would take 8\^10"):
        log_partition(quadratic, [(-8, 8)] * 10)


@pytest.mark.parametrize(
    "barrier,tilt,temperature", [(1.0, 0.0, 1.0), (3.0, 0.5, 0.4), (0.5, -1.0, 2.0), (20.0, 0.1, 1.0)]
)
def test_log_z_agrees_with_adaptive_quadrature(barrier: float, tilt: float, temperature: float) -> None:
    def weight(x: float) -> float:
        return math.exp(-(barrier * (x * x - 1) ** 2 + tilt * x) / temperature)

    z, _ = integrate.quad(weight, -5, 5, epsabs=0, epsrel=1e-12, limit=500)
    value = log_partition(lambda x: double_well(x, barrier, tilt), [(-5, 5)], temperature)
    assert value == pytest.approx(math.log(z), abs=1e-9)
    reach = 8 * math.sqrt(temperature)  # in the plane there is a spring along the second axis
    in_plane = log_partition(lambda x: double_well(x, barrier, tilt), [(-5, 5), (-reach, reach)], temperature)
    assert in_plane == pytest.approx(math.log(z) + math.log(2 * math.pi * temperature) / 2, abs=1e-9)


@pytest.mark.parametrize("name", ["mixture", "mixture25", "moons", "rings"])
def test_the_energy_of_a_normalised_density_has_log_z_zero(name: str) -> None:
    assert log_partition(toy(name).energy, toy(name).bounds, check_tail=False) == pytest.approx(0, abs=1e-6)
    assert log_partition(toy(name).energy, [(-5, 5), (-5, 5)]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("offset", [-1e5, -800.0, 3.0, 800.0, 1e5])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_constant_moves_log_z_and_nothing_else(offset: float, temperature: float) -> None:
    plain = thermodynamics(double_well, [(-6, 6)], temperature)
    moved = thermodynamics(lambda x: double_well(x) + offset, [(-6, 6)], temperature)
    assert moved.log_z == pytest.approx(plain.log_z - offset / temperature, abs=1e-9)  # 1e5 is rounded to 1e-11
    assert moved.entropy == pytest.approx(plain.entropy, abs=1e-9)
    assert moved.mean_energy - offset == pytest.approx(plain.mean_energy, abs=1e-9)


def test_only_the_ratio_of_energy_and_temperature_matters() -> None:
    for scale in (1e-6, 0.3, 1e6):
        value = log_partition(lambda x, s=scale: s * double_well(x), [(-4, 4)], temperature=0.5 * scale)
        assert value == pytest.approx(log_partition(double_well, [(-4, 4)], 0.5), abs=1e-10)


def test_stretching_space_adds_the_log_of_the_volume() -> None:
    plain = log_partition(double_well, [(-4, 4)])
    for c in (1e-4, 10.0, 1e5):
        stretched = log_partition(lambda x, c=c: double_well(x / c), [(-4 * c, 4 * c)])
        assert stretched == pytest.approx(plain + math.log(c), abs=1e-9)


def test_independent_coordinates_add_their_log_z() -> None:
    both = log_partition(lambda x: double_well(x[:, :1]) + quadratic(x[:, 1:], 3.0), [(-4, 4), (-5, 5)])
    one, other = log_partition(double_well, [(-4, 4)]), log_partition(lambda x: quadratic(x, 3.0), [(-5, 5)])
    assert both == pytest.approx(one + other, abs=1e-10)


def test_bends_converge_slowly_and_to_the_right_value() -> None:
    value = log_partition(lambda x: x[:, 0].abs(), [(-40, 40)], rtol=1e-7)
    assert value == pytest.approx(math.log(2), abs=1e-6)  # a bend: the error left is a few times the last step


def test_jumps_are_refused_at_tight_tolerance_and_served_at_a_loose_one() -> None:
    box = box_of(-math.sqrt(2), math.sqrt(2))
    with pytest.raises(ConvergenceError, match="not settled to within 1e-08"):
        log_partition(box, [(-3, 3)], max_points=50_000)
    assert log_partition(box, [(-3, 3)], rtol=1e-3) == pytest.approx(math.log(2 * math.sqrt(2)), abs=1e-2)


def test_grids_do_not_agree_by_marching_in_step(make_generator: Factory) -> None:
    """Boxes of random width: even where a few grids count the same share of cells, log Z must not settle on it."""
    for half in (0.1 + 2.8 * torch.rand(40, generator=make_generator(5), dtype=F64)).tolist():
        with pytest.raises(ConvergenceError):
            log_partition(box_of(-half, half), [(-3, 3)], max_points=9000)


def test_an_energy_that_is_infinite_everywhere_is_refused() -> None:
    with pytest.raises(ConvergenceError, match=r"\[-inf, -inf, -inf\]"):
        log_partition(lambda x: torch.full((len(x),), math.inf), [(0, 1)], max_points=9000)


def test_the_checkerboard_is_exact_on_its_own_grid() -> None:
    board = toy("checkerboard")
    grid = make_grid(board.bounds, 4)
    z = (torch.exp(-board.energy(grid.points)) * grid.cell_volume).sum().item()
    assert z == pytest.approx(1, abs=1e-14)


# Bounds that cut mass


@pytest.mark.parametrize("half", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("d", [1, 2])
def test_tight_bounds_are_reported_with_the_mass_they_cut(half: float, d: int) -> None:
    with pytest.raises(ConvergenceError, match="cut off mass") as info:
        log_partition(quadratic, [(-half, half)] * d)
    said = float(str(info.value).split("a fraction ")[1].split(" lies")[0])
    inner, outer = math.erf(half / math.sqrt(2)), math.erf(1.5 * half / math.sqrt(2))
    assert said == pytest.approx(1 - (inner / outer) ** d, rel=0.25)  # seen by a coarse grid of half as many cells


def test_wide_bounds_a_looser_limit_and_a_space_that_ends_are_accepted() -> None:
    exact = 0.5 * math.log(2 * math.pi)
    assert log_partition(quadratic, [(-5.5, 5.5)]) == pytest.approx(exact, abs=1e-7)
    assert log_partition(quadratic, [(-4, 4)], tail_tol=1e-3) == pytest.approx(exact, abs=1e-4)
    cut = log_partition(quadratic, [(-1, 1)], rtol=1e-6, check_tail=False)
    assert cut == pytest.approx(exact + math.log(math.erf(1 / math.sqrt(2))), abs=1e-5)


def test_a_flat_energy_has_no_partition_function_unless_space_ends() -> None:
    with pytest.raises(ConvergenceError, match=r"a fraction 0\.333 lies outside"):
        log_partition(lambda x: 0 * x[:, 0], [(-1, 1)])
    th = thermodynamics(lambda x: 0 * x[:, 0] + 2.0, [(-1, 1), (0, 3)], check_tail=False)
    assert th.log_z == pytest.approx(math.log(6) - 2, abs=1e-12)
    assert th.entropy == pytest.approx(math.log(6), abs=1e-12) and th.mean_energy == pytest.approx(2, abs=1e-12)


def test_a_shifted_box_is_noticed_on_either_side() -> None:
    for bounds in ([(-8, 1)], [(-1, 8)], [(-8, 8), (-8, 1)], [(-1, 8), (-8, 8)]):
        with pytest.raises(ConvergenceError, match="cut off mass"):
            log_partition(quadratic, bounds)


# What an energy must not do, and what must not happen to it


@pytest.mark.parametrize(
    "energy,got",
    [
        (lambda x: x.square().sum(1, keepdim=True), r"\(4096, 1\)"),
        (lambda x: x.square().sum(), r"\(\)"),
        (lambda x: x.square(), r"\(4096, 1\)"),
        (lambda x: x.square().sum(1)[:3], r"\(3,\)"),
        (lambda x: 3.0, "float"),
        (lambda x: x.numpy()[:, 0], "ndarray"),
    ],
)
def test_energies_of_the_wrong_shape_are_refused(energy: Any, got: str) -> None:
    for call in (log_partition, thermodynamics):
        with pytest.raises(ValueError, match=rf"an energy must return one number per point.*returned {got}"):
            call(energy, [(-1, 1)])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_energies_that_are_nan_or_minus_infinity_are_refused_with_the_place(bad: float) -> None:
    def broken(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0.9, bad, 0.0)

    with pytest.raises(FloatingPointError, match=rf"the energy is {bad} at x = \[0\.9"):
        log_partition(broken, [(0, 1)])


def test_the_number_of_points_is_limited_in_all_and_at_once() -> None:
    seen: list[int] = []

    def counted(x: Tensor) -> Tensor:
        seen.append(len(x))
        return box_of(-1.1, 1.1)(x[:, :1])

    with pytest.raises(ConvergenceError):
        log_partition(counted, [(-3, 3), (0, 1)], max_points=200_000)
    assert max(seen) <= 2**16 and sum(seen) < 5 * 200_000


def small_net(make_generator: Factory) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1), nn.Flatten(0))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=make_generator(6)))
    return net


def test_networks_in_single_and_double_precision_agree(make_generator: Factory, device: torch.device) -> None:
    net = small_net(make_generator).to(device)
    bounds = [(-9.0, 9.0), (-9.0, 9.0)]
    single = log_partition(lambda x: net(x) + quadratic(x), bounds, rtol=1e-5, dtype=torch.float32, device=device)
    net.double()
    double = log_partition(lambda x: net(x) + quadratic(x), bounds, device=device)
    assert single == pytest.approx(double, abs=1e-4)


def test_integration_leaves_no_trace_on_the_energy_or_on_the_settings_of_torch(make_generator: Factory) -> None:
    net = small_net(make_generator).double().train()
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    thermodynamics(lambda x: net(x) + quadratic(x), [(-9, 9), (-9, 9)])
    with pytest.raises(ValueError):
        log_partition(lambda x: net(x)[:, None], [(-9, 9), (-9, 9)])
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


# Thermodynamics


@pytest.mark.parametrize("temperature", [0.05, 0.7, 4.0])
@pytest.mark.parametrize("name,energy", [("spring", quadratic), ("wells", double_well)])
def test_the_identities_of_thermodynamics(name: str, energy: Any, temperature: float) -> None:
    reach = 9 * math.sqrt(temperature) + (2 if name == "wells" else 0)
    bounds, h = [(-reach, reach)], 1e-4 * temperature
    th = thermodynamics(energy, bounds, temperature)
    assert isinstance(th, Thermodynamics)
    assert th.free_energy == pytest.approx(th.mean_energy - temperature * th.entropy, abs=1e-10)
    assert th.log_z == log_partition(energy, bounds, temperature)
    lower, upper = (thermodynamics(energy, bounds, temperature + s) for s in (-h, h))
    # central differences: the error is h²/6 times a third derivative, some 1e-8 of the value
    assert th.entropy == pytest.approx(-(upper.free_energy - lower.free_energy) / (2 * h), abs=1e-6)
    beta = 1 / (temperature + h) - 1 / (temperature - h)
    assert th.mean_energy == pytest.approx(-(upper.log_z - lower.log_z) / beta, rel=1e-6)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_equipartition_and_the_entropy_of_a_gaussian(d: int) -> None:
    for curvature, temperature in ((1.0, 1.0), (9.0, 0.5), (0.1, 3.0)):
        s = math.sqrt(temperature / curvature)
        th = thermodynamics(lambda x, k=curvature: quadratic(x, k), [(-8 * s, 8 * s)] * d, temperature)
        assert th.mean_energy == pytest.approx(d * temperature / 2, rel=1e-10)
        assert th.entropy == pytest.approx(d / 2 * math.log(2 * math.pi * math.e * s * s), abs=1e-10)


def test_infinite_energies_carry_no_mass_and_no_energy() -> None:
    def half_spring(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0, quadratic(x), math.inf)

    th = thermodynamics(half_spring, [(-9, 9)], rtol=1e-3)
    assert th.log_z == pytest.approx(0.5 * math.log(math.pi / 2), abs=1e-2)
    assert th.mean_energy == pytest.approx(0.5, abs=1e-2) and math.isfinite(th.entropy)


def test_the_boltzmann_distribution_has_the_lowest_free_energy(make_generator: Factory) -> None:
    e = torch.randn(6, generator=make_generator(8), dtype=F64)
    q = -torch.rand(500, 6, generator=make_generator(9), dtype=F64).log()
    q /= q.sum(1, keepdim=True)
    for t in (0.2, 1.0, 5.0):
        p, free = boltzmann_probs(e, t), -t * torch.logsumexp(-e / t, 0)
        excess = (q * e).sum(1) + t * (q * q.log()).sum(1) - free
        assert torch.allclose(excess, t * (q * (q / p).log()).sum(1), atol=1e-11) and (excess > 0).all()


# The density


def test_a_density_integrates_to_one_and_may_exceed_one() -> None:
    def stiff(x: Tensor) -> Tensor:
        return quadratic(x, 1e4)

    grid = make_grid([(-0.08, 0.08)], 400)
    p = log_density(stiff, grid.points, log_partition(stiff, [(-0.08, 0.08)])).exp()
    assert (p.sum() * grid.cell_volume).item() == pytest.approx(1, abs=1e-10)
    assert p.max().item() > 39 and p.max().item() == pytest.approx(100 / math.sqrt(2 * math.pi), rel=1e-3)


def test_log_density_of_a_toy_is_its_log_prob(make_generator: Factory) -> None:
    x = toy("moons").sample(100, make_generator(10)).double()
    shifted = log_density(lambda x: toy("moons").energy(x) + 7.0, x, log_z=-7.0)
    assert torch.allclose(shifted, toy("moons").log_prob(x), atol=1e-12)


def test_the_score_does_not_know_the_partition_function(make_generator: Factory) -> None:
    x = torch.randn(5, 3, generator=make_generator(11), dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(double_well(x).sum(), x)
    for log_z in (0.0, 1e4):
        (score,) = torch.autograd.grad(log_density(double_well, x, log_z, 0.6).sum(), x)
        assert torch.allclose(score, -slope / 0.6, rtol=1e-13)


def test_log_density_is_differentiable_in_the_parameters_and_checks_shapes() -> None:
    k = torch.tensor(2.0, dtype=F64, requires_grad=True)
    x = torch.tensor([[1.0], [3.0]], dtype=F64)
    log_density(lambda x: k * x[:, 0] ** 2 / 2, x, log_z=0.0, temperature=0.5).sum().backward()
    assert k.grad is not None and k.grad.item() == pytest.approx(-(1 + 9) / 2 / 0.5)
    for bad in (lambda x: x, lambda x: x.sum(), lambda x: 1.0):
        with pytest.raises(ValueError, match="an energy must return one number per point"):
            log_density(bad, x, 0.0)
