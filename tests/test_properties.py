"""Properties for all shapes, precisions, bounds, temperatures and clips; hypothesis searches for exceptions.

The search is derandomised: the same examples on every run and every machine. None of these tests is statistical: what
is claimed holds for every outcome of the random numbers.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebm_lit.boltzmann import boltzmann_probs, make_grid
from ebm_lit.contrastive_divergence import ReplayBuffer, cd_loss, reinit_by_age
from ebm_lit.data import TOYS, as_image_tensor, toy
from ebm_lit.energy import energy_and_grad
from ebm_lit.langevin import (
    MALA,
    Langevin,
    acceptance_margin,
    implied_temperature,
    langevin_step,
    mala_step,
    noise_scale_for,
    quadratic_law,
    uniform_init,
)

examples = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

seeds = st.integers(0, 2**31)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
positive = st.floats(1e-6, 1e3)
step_sizes = st.floats(1e-5, 0.4)
temperatures = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[float, float]:
    """(low, high), representable in bfloat16 so that a state may lie exactly on a bound."""
    low = draw(st.integers(-64, 63))
    return low / 16, draw(st.integers(low + 1, 64)) / 16


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spring(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1) / 2


def start(seed: int, n: int, shape: tuple[int, ...], dtype: torch.dtype, box: tuple[float, float] | None) -> Tensor:
    return uniform_init(n, shape, box or (-1.0, 1.0), g(seed)).to(dtype)


# Samplers


@examples
@given(seeds, st.integers(1, 5), shapes, dtypes, st.none() | boxes(), temperatures, step_sizes, st.none() | positive)
def test_langevin_keeps_its_promises(
    seed: int,
    n: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    box: tuple[float, float] | None,
    temperature: float,
    step_size: float,
    clip: float | None,
) -> None:
    x = start(seed, n, shape, dtype, box)
    before, sampler = x.clone(), Langevin(step_size, 4, temperature=temperature, grad_clip=clip, bounds=box)
    chain = sampler.run(spring, x, generator=g(seed + 1), trajectory=5, diagnostics=True)
    assert chain.x.shape == x.shape and chain.x.dtype == dtype and chain.x.device == x.device
    assert torch.equal(x, before) and not chain.x.requires_grad
    assert torch.equal(chain.x, sampler.sample(spring, x, generator=g(seed + 1)))
    film, d = chain.trajectory, chain.diagnostics
    assert film is not None and d is not None and torch.isfinite(film).all()
    assert torch.equal(film[0], x) and torch.equal(film[-1], chain.x) and chain.trajectory_steps.tolist() == [*range(5)]
    if box is not None:
        assert film.min() >= box[0] and film.max() <= box[1]
    for rate in (d.clip_rate, d.saturation_rate):
        assert ((rate >= 0) & (rate <= 1)).all()
    assert (clip is not None) or (d.clip_rate == 0).all()
    if temperature == 0 and clip is None and box is None:
        torch.testing.assert_close(
            chain.x, (1 - step_size) ** 4 * x, rtol=5e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


@examples
@given(seeds, st.integers(1, 5), shapes, dtypes, st.none() | boxes(), temperatures, positive)
def test_mala_keeps_its_promises(
    seed: int,
    n: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    box: tuple[float, float] | None,
    temperature: float,
    step_size: float,
) -> None:
    x = start(seed, n, shape, dtype, box)
    before, sampler = x.clone(), MALA(step_size, 4, temperature, box)
    chain = sampler.run(spring, x, generator=g(seed + 1), trajectory=5, diagnostics=True)
    assert chain.x.shape == x.shape and chain.x.dtype == dtype and chain.x.device == x.device
    assert torch.equal(x, before) and not chain.x.requires_grad
    assert torch.equal(chain.x, sampler.sample(spring, x, generator=g(seed + 1)))
    film = chain.trajectory
    assert film is not None and torch.isfinite(film).all() and torch.equal(film[0], x)
    if box is not None:
        assert film.min() >= box[0] and film.max() <= box[1]
    moved = (film.diff(dim=0) != 0).flatten(2).any(2)
    taken = chain.acceptance_rate * 4
    assert ((chain.acceptance_rate >= 0) & (chain.acceptance_rate <= 1)).all()
    assert (moved.sum(0) <= taken).all(), "who was refused has not moved"
    if temperature == 0:
        energies = torch.stack([spring(frame.double()) for frame in film])
        assert (energies.diff(dim=0) <= 1e-2 * energies[:-1]).all(), "without noise a chain descends or stays"


@examples
@given(seeds, shapes, step_sizes, temperatures)
def test_mala_step_is_a_langevin_step_or_none(
    seed: int, shape: tuple[int, ...], eta: float, temperature: float
) -> None:
    x = torch.randn(6, *shape, generator=g(seed), dtype=torch.float64)
    e, grad = energy_and_grad(spring, x)
    s = mala_step(spring, x, e, grad, eta, temperature, g(seed + 1))
    noise = torch.randn(x.shape, generator=g(seed + 1), dtype=x.dtype)
    proposal = langevin_step(x, grad, eta, noise_scale_for(eta, temperature), noise)
    expected = torch.where(s.accepted.view(-1, *[1] * len(shape)), proposal, x)
    torch.testing.assert_close(s.x, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(s.energy, spring(s.x))
    torch.testing.assert_close(s.grad, s.x)


@examples
@given(seeds, shapes, positive)
def test_margin_there_and_back_cancel(seed: int, shape: tuple[int, ...], eta: float) -> None:
    """log r(x → y) = −log r(y → x), 0 for no move, and η/4·(‖x‖² − ‖y‖²) on a spring."""
    x, y = torch.randn(2, 5, *shape, generator=g(seed), dtype=torch.float64)
    at_x, at_y = energy_and_grad(spring, x), energy_and_grad(spring, y)
    there, back = acceptance_margin(y - x, *at_x, *at_y, eta), acceptance_margin(x - y, *at_y, *at_x, eta)
    torch.testing.assert_close(there, -back, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(there, eta / 2 * (spring(x) - spring(y)), rtol=1e-9, atol=1e-9)
    assert (acceptance_margin(x - x, *at_x, *at_x, eta) == 0).all()


@examples
@given(positive, temperatures)
def test_noise_and_temperature_are_two_names_of_one_setting(eta: float, temperature: float) -> None:
    sigma = noise_scale_for(eta, temperature)
    assert sigma**2 == pytest.approx(2 * eta * temperature, rel=1e-12)
    assert implied_temperature(eta, sigma) == pytest.approx(temperature, rel=1e-12)
    assert Langevin(eta, temperature=temperature).sigma == sigma
    assert Langevin(eta, noise_scale=sigma).implied_temperature == pytest.approx(temperature, rel=1e-12)
    assert noise_scale_for(4 * eta, temperature) == pytest.approx(2 * sigma, rel=1e-12), "noise goes with the root"


@examples
@given(st.floats(0.01, 10), st.floats(0.01, 1.9), temperatures, st.integers(0, 30), st.integers(0, 30))
def test_quadratic_law_is_that_of_a_chain(k: float, eta_k: float, temperature: float, m: int, n: int) -> None:
    """m steps and then n are m + n; the stationary law stays where it is, above the target by 1/(1 − ηk/2)."""
    eta = eta_k / k
    half = quadratic_law(k, eta, temperature, m, 1.0, 2.0)
    whole = quadratic_law(k, eta, temperature, m + n, 1.0, 2.0)
    assert quadratic_law(k, eta, temperature, n, *half) == pytest.approx(whole, rel=1e-9, abs=1e-12)
    stationary = quadratic_law(k, eta, temperature)
    assert quadratic_law(k, eta, temperature, n, *stationary) == pytest.approx(stationary, rel=1e-9, abs=1e-12)
    assert stationary[1] >= temperature / k


@examples
@given(seeds, st.integers(1, 8), shapes, boxes())
def test_uniform_init_stays_in_its_box(seed: int, n: int, shape: tuple[int, ...], box: tuple[float, float]) -> None:
    x = uniform_init(n, shape, box, g(seed))
    assert x.shape == (n, *shape) and x.min() >= box[0] and x.max() <= box[1]
    assert torch.equal(x, uniform_init(n, shape, box, g(seed)))


@examples
@given(
    st.sampled_from([Langevin, MALA]),
    st.sampled_from(["step_size", "temperature", "n_steps", "bounds"]),
    st.sampled_from([math.nan, -math.inf, -1.0, (1.0, 0.0), (0.0, 0.0)]),
)
def test_settings_without_meaning_are_refused_in_one_line(sampler: Any, name: str, value: Any) -> None:
    assume((name == "bounds") == isinstance(value, tuple))
    with pytest.raises(ValueError, match=name) as error:
        sampler(**({"step_size": 0.1} | {name: value}))
    assert "\n" not in str(error.value)


# The replay buffer


@examples
@given(seeds, st.integers(1, 30), shapes, st.floats(0, 1), st.integers(0, 50), st.data())
def test_what_is_drawn_is_what_is_written(
    seed: int, size: int, shape: tuple[int, ...], reinit: float, n_steps: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, size))
    buffer = ReplayBuffer.create(size, lambda k, gen: uniform_init(k, shape, generator=gen), g(seed))
    buffer.ages += torch.arange(size)
    samples, ages = buffer.samples.clone(), buffer.ages.clone()
    draw = buffer.draw(n, lambda k, gen: torch.full((k, *shape), 5.0), reinit, g(seed + 1))
    assert torch.equal(buffer.samples, samples) and torch.equal(buffer.ages, ages), "drawing changes nothing"
    assert len(draw.slots.unique()) == n and draw.slots.min() >= 0 and draw.slots.max() < size
    fresh = (draw.x == 5.0).flatten(1).all(1)
    assert torch.equal(draw.x[~fresh], samples[draw.slots][~fresh])
    assert torch.equal(draw.ages, torch.where(fresh, 0, ages[draw.slots]))
    assert fresh.all() if reinit == 1 else True
    assert not fresh.any() if reinit == 0 else True

    buffer.write(draw, draw.x - 7.0, n_steps)
    written = torch.zeros(size, dtype=torch.bool)
    written[draw.slots] = True
    assert torch.equal(buffer.samples[~written], samples[~written]) and torch.equal(
        buffer.ages[~written], ages[~written]
    )
    assert torch.equal(buffer.samples[draw.slots], draw.x - 7.0)
    assert torch.equal(buffer.ages[draw.slots], draw.ages + n_steps)


@examples
@given(st.integers(1, 1000), st.floats(1e-3, 1e6), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_reinit_by_age_is_a_probability_that_falls(n_steps: int, scale: float, ages: list[int]) -> None:
    p = reinit_by_age(n_steps, scale)(torch.tensor(sorted(ages)))
    assert ((p >= 0) & (p <= 1)).all() and (p.diff() <= 0).all()


# The loss

energies = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20).map(lambda e: torch.tensor(e, dtype=torch.float64))


@examples
@given(energies, energies, st.floats(0, 10), st.floats(-100, 100))
def test_cd_loss_identities(e_pos: Tensor, e_neg: Tensor, alpha: float, shift: float) -> None:
    loss = cd_loss(e_pos, e_neg, alpha)
    assert loss.loss.item() == pytest.approx((loss.energy_gap + loss.regulariser).item())
    assert loss.energy_gap.item() == pytest.approx((e_pos.mean() - e_neg.mean()).item(), abs=1e-9)
    assert loss.regulariser >= 0 and (alpha > 0 or loss.regulariser == 0)
    swapped = cd_loss(e_neg, e_pos, alpha)
    assert swapped.energy_gap.item() == pytest.approx(-loss.energy_gap.item(), abs=1e-9)
    assert swapped.regulariser.item() == pytest.approx(loss.regulariser.item())
    assert cd_loss(e_pos + shift, e_neg + shift).loss.item() == pytest.approx(
        cd_loss(e_pos, e_neg).loss.item(), abs=1e-8
    )
    repeated = cd_loss(e_pos.repeat(3), e_neg.repeat(2), alpha)
    assert repeated.loss.item() == pytest.approx(loss.loss.item(), rel=1e-9, abs=1e-9), "means, not sums"
    if alpha > 0:
        assert loss.loss.item() >= -1 / (2 * alpha) * (1 + 1e-12)


@examples
@given(energies, energies, st.floats(0, 10))
def test_cd_loss_pulls_data_down_and_negatives_up(e_pos: Tensor, e_neg: Tensor, alpha: float) -> None:
    """∂/∂E₊ᵢ = (1 + 2αE₊ᵢ)/B and ∂/∂E₋ᵢ = (−1 + 2αE₋ᵢ)/M."""
    pos, neg = e_pos.requires_grad_(), e_neg.requires_grad_()
    by_pos, by_neg = torch.autograd.grad(cd_loss(pos, neg, alpha).loss, (pos, neg))
    torch.testing.assert_close(by_pos, (1 + 2 * alpha * pos.detach()) / len(pos))
    torch.testing.assert_close(by_neg, (-1 + 2 * alpha * neg.detach()) / len(neg))


# Densities and data


@examples
@given(energies, st.floats(1e-2, 1e3), st.floats(-1e3, 1e3))
def test_boltzmann_probabilities(e: Tensor, temperature: float, shift: float) -> None:
    p = boltzmann_probs(e, temperature)
    assert p.sum().item() == pytest.approx(1) and (p >= 0).all()
    order = e.argsort()
    assert (p[order].diff() <= 1e-15).all(), "low energy = likely"
    torch.testing.assert_close(boltzmann_probs(e + shift, temperature), p, rtol=1e-6, atol=1e-9)


@examples
@given(boxes(), st.integers(1, 40))
def test_grid_covers_its_box(box: tuple[float, float], n: int) -> None:
    grid = make_grid([box], n)
    assert grid.points.min() >= box[0] and grid.points.max() <= box[1]
    assert grid.cell_volume * len(grid.points) == pytest.approx(box[1] - box[0])


@settings(examples, max_examples=15)
@given(st.sampled_from(TOYS), st.integers(0, 30), seeds)
def test_toys_sample_where_they_have_density(name: str, n: int, seed: int) -> None:
    x = toy(name).sample(n, g(seed))
    assert x.shape == (n, 2) and torch.equal(x, toy(name).sample(n, g(seed)))
    assert torch.isfinite(toy(name).log_prob(x)).all()


@examples
@given(seeds, st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 6))
def test_images_come_out_between_minus_one_and_one(seed: int, n: int, c: int, h: int, w: int) -> None:
    raw = torch.randint(0, 256, (n, c, h, w), generator=g(seed), dtype=torch.uint8)
    x = as_image_tensor(raw)
    assert x.shape == raw.shape and x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), raw), "no grey value is lost"
