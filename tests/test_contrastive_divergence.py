"""The gradient of the likelihood, the loss that stands for it, the buffer's contracts, the three kinds of negatives.

Statistical tests use fixed generators and state how often a correct implementation would fail them by bad luck.
"""

import copy
import math
import time
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from ebm_lit.boltzmann import boltzmann_probs, log_density, log_partition, make_grid, quadratic
from ebm_lit.contrastive_divergence import (
    CDLoss,
    ReplayBuffer,
    cd_loss,
    negatives_from_buffer,
    negatives_from_data,
    negatives_from_noise,
    reinit_by_age,
    walk_buffer,
)
from ebm_lit.data import toy
from ebm_lit.energy import EnergyCNN, EnergyMLP
from ebm_lit.langevin import Langevin, NonFiniteError, quadratic_law, uniform_init

Factory = Callable[..., torch.Generator]


def gradient(energy: nn.Module, loss: Tensor) -> Tensor:
    """The gradient of a scalar with respect to all parameters, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(energy.parameters()))])


def counting(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Chains that carry their own number: 0, 1, 2, …"""
    return torch.arange(float(n))[:, None]


def minus_one(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Fresh chains that can be told from all others."""
    return torch.full((n, 1), -1.0)


def uniform(n: int, generator: torch.Generator | None = None) -> Tensor:
    """U(−4, 4)², on the generator's device."""
    return uniform_init(n, (2,), (-4.0, 4.0), generator)


class Spring(nn.Module):
    """E = θ‖x‖²/2 with one trainable number."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta * x.square().flatten(1).sum(1) / 2


# The gradient identity


@pytest.mark.parametrize(("dim", "width", "depth", "n"), [(1, 16, 2, 400), (2, 32, 3, 80), (3, 8, 2, 24)])
def test_gradient_of_the_exact_nll_is_a_difference_of_expectations(
    dim: int, width: int, depth: int, n: int, make_generator: Factory
) -> None:
    energy = EnergyMLP(dim, width, depth, confine=2.0, generator=make_generator(1)).double()
    x_data = torch.randn(200, dim, generator=make_generator(2), dtype=torch.float64)
    grid = make_grid([(-8, 8)] * dim, n)

    nll = energy(x_data).mean() + torch.logsumexp(-energy(grid.points), 0) + math.log(grid.cell_volume)
    weights = boltzmann_probs(energy(grid.points)).detach()
    expectations = gradient(energy, energy(x_data).mean()) - gradient(energy, (weights * energy(grid.points)).sum())
    assert (gradient(energy, nll) - expectations).abs().max() < 1e-8


def test_gradient_agrees_with_finite_differences_of_the_refined_log_partition(make_generator: Factory) -> None:
    """The other test differentiates a sum; this one differences an integral that knows nothing of autograd."""
    energy = EnergyMLP(2, 16, 2, confine=1.0, generator=make_generator(3)).double()
    x_data = torch.randn(100, 2, generator=make_generator(4), dtype=torch.float64)
    grid, box = make_grid([(-9, 9)] * 2, 120), [(-9.0, 9.0)] * 2
    weights = boltzmann_probs(energy(grid.points)).detach()
    expected = gradient(energy, energy(x_data).mean()) - gradient(energy, (weights * energy(grid.points)).sum())

    start = nn.utils.parameters_to_vector(energy.parameters()).detach()
    direction = torch.randn(len(start), generator=make_generator(5), dtype=torch.float64)
    direction /= direction.norm()
    values = []
    for eps in (1e-4, -1e-4):
        nn.utils.vector_to_parameters(start + eps * direction, energy.parameters())
        values.append(-log_density(energy, x_data, log_partition(energy, box, rtol=1e-11)).mean().item())
    assert (values[0] - values[1]) / 2e-4 == pytest.approx((expected @ direction).item(), abs=1e-6)


def test_gradient_of_the_loss_is_the_difference_of_the_mean_gradients(make_generator: Factory) -> None:
    energy = EnergyMLP(2, 16, 2, generator=make_generator(6)).double()
    x_pos, x_neg = torch.randn(2, 50, 2, generator=make_generator(7), dtype=torch.float64)
    x_neg = x_neg[:30]  # the batches may differ in size
    one_by_one = [torch.stack([gradient(energy, energy(one[None])[0]) for one in x]).mean(0) for x in (x_pos, x_neg)]
    loss = cd_loss(energy(x_pos), energy(x_neg)).loss
    assert torch.allclose(gradient(energy, loss), one_by_one[0] - one_by_one[1], atol=1e-12)


def test_descent_lowers_data_against_negatives(make_generator: Factory) -> None:
    energy = EnergyMLP(2, 16, 2, generator=make_generator(8)).double()
    x_pos, x_neg = torch.randn(2, 50, 2, generator=make_generator(9), dtype=torch.float64)
    optimizer = torch.optim.SGD(energy.parameters(), lr=1e-4)
    before = cd_loss(energy(x_pos), energy(x_neg))
    before.loss.backward()
    norm2 = sum(p.grad.square().sum().item() for p in energy.parameters() if p.grad is not None)
    optimizer.step()
    change = cd_loss(energy(x_pos), energy(x_neg)).energy_gap - before.energy_gap
    assert change.item() == pytest.approx(-1e-4 * norm2, rel=1e-2)  # to first order in the step


# The loss


def test_loss_by_hand() -> None:
    loss = cd_loss(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]), alpha=0.1)
    assert isinstance(loss, CDLoss)
    assert loss.energy_gap.item() == -2.5
    assert loss.regulariser.item() == pytest.approx(1.95)
    assert loss.loss.item() == pytest.approx(-0.55)
    assert cd_loss(torch.tensor([1.0]), torch.tensor([3.0])) == (-2.0, -2.0, 0.0)  # α = 0 by default


@pytest.mark.parametrize("alpha", [0.01, 0.1, 3.0])
def test_loss_has_a_floor_and_reaches_it(alpha: float, make_generator: Factory) -> None:
    floor = -1 / (2 * alpha)
    bottom = torch.tensor([1 / (2 * alpha)], dtype=torch.float64, requires_grad=True)
    lowest = cd_loss(-bottom, bottom, alpha).loss
    assert lowest.item() == pytest.approx(floor, rel=1e-12)
    assert torch.autograd.grad(lowest, bottom)[0].abs() < 1e-12
    for scale in (0.1, 1.0, 10.0):
        pairs = scale / alpha * torch.randn(1000, 2, 4, generator=make_generator(10), dtype=torch.float64)
        assert all(cd_loss(e_pos, e_neg, alpha).loss >= floor for e_pos, e_neg in pairs)


def test_a_constant_shifts_the_regulariser_only() -> None:
    e_pos, e_neg = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([3.0, 5.0]).double()
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = cd_loss(e_pos + shift, e_neg + shift, 0.1)
    assert torch.autograd.grad(loss.energy_gap, shift, retain_graph=True)[0] == 0
    expected = 2 * 0.1 * (e_pos.mean() + e_neg.mean())
    assert torch.autograd.grad(loss.regulariser, shift)[0].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_keeps_the_dtype(dtype: torch.dtype) -> None:
    e = torch.ones(3, dtype=dtype)
    assert all(part.dtype == dtype and part.ndim == 0 for part in cd_loss(e, e, 0.1))


@pytest.mark.parametrize(("pos", "neg"), [((4, 1), (4,)), ((4,), (4, 1)), ((), (4,)), ((0,), (4,)), ((4,), (0,))])
def test_loss_rejects_other_shapes(pos: tuple[int, ...], neg: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shapes \(B,\) and \(M,\)") as error:
        cd_loss(torch.ones(pos), torch.ones(neg))
    assert str(pos) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("alpha", [-0.1, math.nan])
def test_loss_rejects_a_negative_weight(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be >= 0"):
        cd_loss(torch.ones(2), torch.ones(2), alpha)


# The buffer


def test_slots_are_different_and_read_where_they_say(make_generator: Factory) -> None:
    buffer = ReplayBuffer.create(50, counting)
    buffer.ages += torch.arange(50)
    for seed in range(20):
        draw = buffer.draw(30, minus_one, 0.0, make_generator(seed))
        assert len(set(draw.slots.tolist())) == 30
        assert torch.equal(draw.x[:, 0], draw.slots.float()) and torch.equal(draw.ages, draw.slots)
    assert sorted(buffer.draw(50, minus_one).slots.tolist()) == list(range(50))


def test_every_slot_is_drawn_equally_often(make_generator: Factory) -> None:
    """Chi-square over 40 slots; draws without replacement vary less than independent ones. False alarm below 1e-7.

    Power: a slot that is drawn by half too often or too seldom is caught.
    """
    buffer, g, counts = ReplayBuffer.create(40, counting), make_generator(11), torch.zeros(40)
    for _ in range(2000):
        counts[buffer.draw(10, minus_one, 0.0, g).slots] += 1
    statistic = ((counts - 500).square() / (500 * 0.75)).sum().item() * 39 / 40  # a slot's count has variance n·p(1−p)
    assert stats.chi2.sf(statistic, 39) > 1e-7


def test_states_are_written_back_where_they_were_read(make_generator: Factory) -> None:
    buffer = ReplayBuffer.create(20, counting)
    draw = buffer.draw(8, minus_one, 0.0, make_generator(12))
    buffer.write(draw, draw.x + 100, n_steps=7)
    for slot in range(20):
        moved = slot in draw.slots.tolist()
        assert buffer.samples[slot].item() == slot + 100 * moved
        assert buffer.ages[slot].item() == 7 * moved


def test_drawing_changes_nothing_and_hands_out_copies(make_generator: Factory) -> None:
    buffer = ReplayBuffer.create(20, counting)
    draw = buffer.draw(20, minus_one, 0.5, make_generator(13))
    draw.x.fill_(77.0)
    draw.ages.fill_(77)
    assert torch.equal(buffer.samples, counting(20)) and buffer.ages.sum() == 0


def test_buffer_copies_what_init_returns() -> None:
    data = torch.zeros(10, 1)
    buffer = ReplayBuffer.create(10, lambda n, generator: data[:n])  # chains that start at data
    buffer.write(buffer.draw(10, minus_one), torch.ones(10, 1), 1)
    assert (buffer.samples == 1).all() and (data == 0).all()


def test_written_states_carry_no_graph() -> None:
    buffer = ReplayBuffer.create(4, counting)
    buffer.write(buffer.draw(4, minus_one), torch.ones(4, 1, requires_grad=True) * 2, 1)
    assert not buffer.samples.requires_grad


def test_ages_add_up_and_restart(make_generator: Factory) -> None:
    buffer = ReplayBuffer.create(3, counting)
    for n_steps in (5, 7):
        buffer.write(buffer.draw(3, minus_one), torch.zeros(3, 1), n_steps)
    assert buffer.ages.tolist() == [12, 12, 12]
    draw = buffer.draw(3, minus_one, 1.0, make_generator(14))
    assert draw.ages.tolist() == [0, 0, 0] and (draw.x == -1).all()
    buffer.write(draw, draw.x, 4)
    assert buffer.ages.tolist() == [4, 4, 4]


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 1.0])
def test_share_of_restarts_is_binomial(p: float, make_generator: Factory) -> None:
    """False alarm at most 1e-7 for each p; a share wrong by a tenth of p is caught with certainty at p = 0.3."""
    buffer, g, fresh = ReplayBuffer.create(1000, counting), make_generator(15), 0
    for _ in range(100):
        draw = buffer.draw(500, minus_one, p, g)
        is_fresh = draw.x[:, 0] == -1
        assert torch.equal(draw.x[~is_fresh, 0], draw.slots[~is_fresh].float())
        fresh += int(is_fresh.sum())
    assert stats.binomtest(fresh, 50_000, p).pvalue > 1e-7


def test_ages_are_geometric(make_generator: Factory) -> None:
    """Kolmogorov distance of 5,000 independent ages; by Dvoretzky-Kiefer-Wolfowitz a false alarm at most 4e-9."""
    p, k, n, g = 0.1, 15, 5000, make_generator(16)
    buffer = ReplayBuffer.create(n, counting)
    for _ in range(250):  # 0.9^250 = 4e-12 of the chains were never restarted
        draw = buffer.draw(n, counting, p, g)
        buffer.write(draw, draw.x, k)
    assert (buffer.ages % k == 0).all()
    counts = torch.bincount(buffer.ages // k, minlength=251)[1:].double()
    law = p * (1 - p) ** torch.arange(len(counts), dtype=torch.float64)
    assert (counts.cumsum(0) / n - law.cumsum(0)).abs().max() < math.sqrt(10 / n)


def test_restarts_by_age_follow_the_telescope(make_generator: Factory) -> None:
    """The share of chains that survive j draws is s/(s + (j−1)k): six standard errors, false alarm 2e-9 a check."""
    k, s, n, g = 15, 30.0, 5000, make_generator(17)
    buffer = ReplayBuffer.create(n, counting)
    for j in range(1, 60):
        draw = buffer.draw(n, counting, reinit_by_age(k, s), g)
        buffer.write(draw, draw.x, k)
        expected = s / (s + (j - 1) * k)
        share = (buffer.ages == j * k).double().mean().item()
        assert abs(share - expected) <= 6 * math.sqrt(expected * (1 - expected) / n)


def test_reinit_by_age_is_a_probability_and_falls() -> None:
    ages = torch.tensor([0, 10, 100, 10_000])
    assert reinit_by_age(10, 30.0)(ages).tolist() == pytest.approx([1 / 3, 0.25, 10 / 130, 10 / 10_030])
    assert reinit_by_age(60, 30.0)(ages)[0] == 1.0  # never more than certain
    for n_steps, scale in ((0, 30.0), (10, 0.0), (10, -1.0)):
        with pytest.raises(ValueError, match="must be > 0"):
            reinit_by_age(n_steps, scale)


def test_reinit_sees_the_ages_of_the_drawn_chains(make_generator: Factory) -> None:
    buffer = ReplayBuffer.create(10, counting)
    buffer.ages += torch.arange(10)
    draw = buffer.draw(10, minus_one, lambda ages: (ages >= 5).float(), make_generator(18))
    assert torch.equal(draw.x[:, 0] == -1, draw.slots >= 5)


def test_same_generator_same_draws_and_the_global_one_rests(make_generator: Factory) -> None:
    state = torch.get_rng_state()
    buffer = ReplayBuffer.create(64, uniform, make_generator(19))
    again = ReplayBuffer.create(64, uniform, make_generator(19))
    assert torch.equal(buffer.samples, again.samples)
    draws = [buffer.draw(32, uniform, 0.5, make_generator(20)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    assert not torch.equal(draws[0].slots, buffer.draw(32, uniform, 0.5, make_generator(21)).slots)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 9, 5)])
def test_buffer_holds_any_shape(shape: tuple[int, ...], make_generator: Factory) -> None:
    buffer = ReplayBuffer.create(16, lambda n, g: uniform_init(n, shape, generator=g), make_generator(22))
    draw = buffer.draw(5, lambda n, g: torch.full((n, *shape), 9.0), 0.5, make_generator(23))
    assert draw.x.shape == (5, *shape)
    fresh = (draw.x == 9.0).flatten(1)
    assert torch.equal(fresh.all(1), fresh.any(1)), "a chain restarts as a whole"


def test_buffer_errors(make_generator: Factory) -> None:
    buffer = ReplayBuffer.create(10, counting)
    for n in (0, 11, -1):
        with pytest.raises(ValueError, match="n must lie between 1 and the buffer's size 10"):
            buffer.draw(n, minus_one)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"reinit_prob must lie in \[0, 1\]"):
            buffer.draw(5, minus_one, p)
    with pytest.raises(ValueError, match=r"init must return chains of shape \(5, 1\), got \(5, 2\)"):
        buffer.draw(5, uniform)
    with pytest.raises(ValueError, match=r"shape \(5, 1\) of what was drawn, got \(4, 1\)"):
        buffer.write(buffer.draw(5, minus_one), torch.zeros(4, 1), 1)
    for size in (0, -3):
        with pytest.raises(ValueError, match="size must be >= 1"):
            ReplayBuffer.create(size, counting)
    with pytest.raises(ValueError, match="init must return 10 chains, got 3"):
        ReplayBuffer.create(10, lambda n, generator: torch.zeros(3, 1))


# Negatives

NEGATIVES: dict[str, Callable[..., Tensor]] = {
    "data": lambda sampler, energy, g: negatives_from_data(sampler, energy, uniform(16, g), g),
    "noise": lambda sampler, energy, g: negatives_from_noise(sampler, energy, 16, uniform, g),
    "buffer": lambda sampler, energy, g: negatives_from_buffer(
        sampler, energy, ReplayBuffer.create(32, uniform, g), 16, uniform, 0.1, g
    ),
}


@pytest.mark.parametrize("kind", NEGATIVES)
def test_negatives_are_detached_and_leave_no_trace(kind: str, device: torch.device, make_generator: Factory) -> None:
    energy = EnergyMLP(2, 8, 2, generator=make_generator(24)).to(device).train()
    next(energy.parameters()).requires_grad_(False)
    for p in energy.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = copy.deepcopy(energy.state_dict())
    x = NEGATIVES[kind](Langevin(0.01, 5), energy, make_generator(25, device))
    assert x.shape == (16, 2) and not x.requires_grad and x.grad_fn is None and x.device.type == device.type
    assert [p.requires_grad for p in energy.parameters()] == [False] + [True] * 5
    assert all((p.grad == 3.0).all() for p in energy.parameters() if p.grad is not None)
    assert all(module.training for module in energy.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), energy.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", NEGATIVES)
def test_negatives_are_reproducible(kind: str, device: torch.device, make_generator: Factory) -> None:
    energy = EnergyMLP(2, 8, 2, generator=make_generator(26)).to(device)
    a, b = (NEGATIVES[kind](Langevin(0.01, 5), energy, make_generator(27, device)) for _ in range(2))
    assert torch.equal(a, b)


def test_each_kind_starts_where_its_name_says(make_generator: Factory) -> None:
    """With no steps the negatives are the starts themselves."""
    energy, still = EnergyMLP(2, 8, 2, generator=make_generator(28)), Langevin(0.01, n_steps=0)
    x_data = torch.randn(6, 2, generator=make_generator(29))
    assert torch.equal(negatives_from_data(still, energy, x_data), x_data)
    noise = negatives_from_noise(still, energy, 6, uniform, make_generator(30))
    assert torch.equal(noise, uniform(6, make_generator(30)))
    buffer = ReplayBuffer(torch.randn(6, 2, generator=make_generator(31)), torch.zeros(6, dtype=torch.int64))
    kept = {tuple(row) for row in buffer.samples.tolist()}
    assert {tuple(row) for row in negatives_from_buffer(still, energy, buffer, 6, uniform).tolist()} == kept


def test_chains_in_the_buffer_move_on(make_generator: Factory) -> None:
    energy, sampler = EnergyMLP(2, 8, 2, generator=make_generator(32)), Langevin(0.01, 4)
    buffer, g = ReplayBuffer.create(8, uniform, make_generator(33)), make_generator(34)
    x = negatives_from_buffer(sampler, energy, buffer, 8, uniform, 0.0, g)
    assert {tuple(r) for r in x.tolist()} == {tuple(r) for r in buffer.samples.tolist()}
    assert buffer.ages.tolist() == [4] * 8
    negatives_from_buffer(sampler, energy, buffer, 5, uniform, 0.0, g)
    assert sorted(buffer.ages.tolist()) == [4] * 3 + [8] * 5


def test_a_failing_chain_leaves_buffer_and_energy_as_they_were(make_generator: Factory) -> None:
    def cliff(x: Tensor) -> Tensor:
        return x.square().sum(1) * math.inf

    buffer = ReplayBuffer.create(8, uniform, make_generator(35))
    before = copy.deepcopy(buffer)
    with pytest.raises(NonFiniteError):
        negatives_from_buffer(Langevin(0.01, 4), cliff, buffer, 8, uniform, 0.5, make_generator(36))
    assert torch.equal(buffer.samples, before.samples) and torch.equal(buffer.ages, before.ages)


def test_a_sampler_that_anneals_is_told_the_ages(make_generator: Factory) -> None:
    """On a flat energy a step is its noise: 0.1 for old chains, 0.8 for young ones, each its own."""
    flat = lambda x: 0 * x.flatten(1).sum(1)  # noqa: E731
    sampler = Langevin(0.1, 1, noise_scale=0.1, noise_start=0.8, anneal_steps=3)
    buffer = ReplayBuffer.create(1000, lambda n, g: torch.zeros(n, 4))
    buffer.ages[:500] = 100
    walk = walk_buffer(sampler, flat, buffer, 1000, lambda n, g: torch.zeros(n, 4), 0.0, make_generator(0))
    old = walk.ages == 101
    assert int(old.sum()) == 500 and (walk.ages[~old] == 1).all()
    assert 0.05 < walk.x[old].std() < 0.2 and 0.6 < walk.x[~old].std() < 1.0
    assert torch.equal(buffer.samples[walk.slots], walk.x) and torch.equal(buffer.ages[walk.slots], walk.ages)
    again = negatives_from_buffer(sampler, flat, buffer, 1000, lambda n, g: torch.zeros(n, 4), 0.0, make_generator(0))
    assert torch.equal(again, buffer.samples[walk.slots]), "the same draw, without the ages"


def test_images_work_as_points_do(device: torch.device, make_generator: Factory) -> None:
    energy = EnergyCNN((1, 8, 8), width=4, hidden=8, generator=make_generator(37)).to(device)

    def noise(n: int, generator: torch.Generator | None) -> Tensor:
        return uniform_init(n, (1, 8, 8), generator=generator, device=device)

    g, sampler = make_generator(38, device), Langevin(1.0, 3, noise_scale=0.01, bounds=(-1.0, 1.0))
    buffer = ReplayBuffer.create(12, noise, g)
    x = negatives_from_buffer(sampler, energy, buffer, 6, noise, reinit_by_age(3, 30.0), g)
    assert x.shape == (6, 1, 8, 8) and x.abs().max() <= 1
    assert buffer.samples.device.type == buffer.ages.device.type == device.type
    e_pos, e_neg = energy(torch.cat([noise(6, g), x])).chunk(2)
    cd_loss(e_pos, e_neg, 0.01).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in energy.parameters())


@pytest.mark.cuda
def test_buffer_stays_on_the_device_without_synchronisation(make_generator: Factory) -> None:
    g = make_generator(39, "cuda")
    buffer = ReplayBuffer.create(256, uniform, g)
    draw = buffer.draw(64, uniform, 0.1, g)
    buffer.write(draw, draw.x, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw = buffer.draw(64, uniform, 0.1, g)
        buffer.write(draw, draw.x + 1, 5)
        cd_loss(draw.x[:, 0], draw.x[:, 1], 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.device.type == "cuda" for t in (*draw, buffer.samples, buffer.ages))


# What the negatives do to the gradient


@pytest.mark.parametrize("k", [1, 3, 20])
def test_cd_k_shrinks_the_gradient_of_a_spring_and_keeps_its_sign(k: int, make_generator: Factory) -> None:
    """The expected CD-k gradient is (1 − a^2k)(v − v_∞)/2: six standard errors, false alarm 2e-9."""
    theta, eta, v, n = 2.0, 0.05, 1.0, 100_000
    energy = Spring(theta)
    x = torch.randn(n, 1, generator=make_generator(40), dtype=torch.float64)
    x_neg = negatives_from_data(Langevin(eta, k), energy, x, make_generator(41))
    measured = gradient(energy, cd_loss(energy(x), energy(x_neg)).loss).item()
    v_k, v_inf = quadratic_law(theta, eta, 1.0, n_steps=k, var=v)[1], quadratic_law(theta, eta, 1.0)[1]
    expected = (1 - (1 - eta * theta) ** (2 * k)) * (v - v_inf) / 2
    assert expected == pytest.approx((v - v_k) / 2)
    assert abs(measured - expected) < 6 * math.sqrt((v**2 + v_k**2) / (2 * n))
    exact = (v - 1 / theta) / 2
    assert 0 < expected < exact  # shorter, never reversed


def test_long_chains_give_the_exact_gradient_of_a_spring(make_generator: Factory) -> None:
    """From noise, far away, with the known bias of the step taken into account: six standard errors, 2e-9."""
    theta, eta, n = 1.5, 0.1, 50_000

    def far(count: int, generator: torch.Generator | None) -> Tensor:
        return 5 + uniform_init(count, (1,), generator=generator).double()

    energy = Spring(theta)
    x_neg = negatives_from_noise(Langevin(eta, 150), energy, n, far, make_generator(42))
    model_term = gradient(energy, energy(x_neg).mean()).item()
    v_inf = quadratic_law(theta, eta, 1.0)[1]
    assert abs(model_term - v_inf / 2) < 6 * v_inf / math.sqrt(2 * n)
    assert v_inf == pytest.approx(1 / theta, rel=0.1)


def test_persistent_chains_run_through_the_iterations(make_generator: Factory) -> None:
    """Ten rounds of three steps are one chain of thirty: the exact law gives its variance; six standard errors."""
    theta, eta, n, g = 1.0, 0.02, 20_000, make_generator(43)

    def origin(count: int, generator: torch.Generator | None) -> Tensor:
        return torch.zeros(count, 1)

    buffer = ReplayBuffer.create(n, origin)
    for _ in range(10):
        x = negatives_from_buffer(Langevin(eta, 3), quadratic, buffer, n, origin, 0.0, g)
    v = quadratic_law(theta, eta, 1.0, n_steps=30)[1]
    assert abs(x.square().mean().item() - v) < 6 * v * math.sqrt(2 / n)
    assert (buffer.ages == 30).all()


def test_long_chains_from_any_start_agree_with_the_exact_gradient_of_a_network(make_generator: Factory) -> None:
    """Against quadrature: what is left is the noise of 4,000 samples and the bias of the step, together below 15 %."""
    energy = EnergyMLP(2, 16, 2, confine=1.0, generator=make_generator(44))
    with torch.no_grad():
        for p in energy.parameters():
            p.mul_(2.0)  # something with structure
    x_data = 0.5 * torch.randn(4000, 2, generator=make_generator(45)) + torch.tensor([1.0, 0.0])
    grid = make_grid([(-6, 6)] * 2, 150)
    points = grid.points.float()
    weights = boltzmann_probs(energy(points)).detach()
    exact = gradient(energy, energy(x_data).mean()) - gradient(energy, (weights * energy(points)).sum())

    sampler, g = Langevin(0.02, 400), make_generator(46)
    buffer = ReplayBuffer.create(4000, uniform, g)
    negatives = {
        "data": negatives_from_data(sampler, energy, x_data, g),
        "noise": negatives_from_noise(sampler, energy, 4000, uniform, g),
        "buffer": negatives_from_buffer(sampler, energy, buffer, 4000, uniform, 0.0, g),
    }
    short = negatives_from_data(Langevin(0.02, 1), energy, x_data, g)

    def error(x_neg: Tensor) -> float:
        estimate = gradient(energy, cd_loss(energy(x_data), energy(x_neg)).loss)
        return ((estimate - exact).norm() / exact.norm()).item()

    for name, x_neg in negatives.items():
        assert error(x_neg) < 0.15, name
    assert error(short) > 0.5  # one step is no sample of the model


# The target: contrastive divergence against exact maximum likelihood


def steep_energy(generator: torch.Generator) -> EnergyMLP:
    energy = EnergyMLP(2, 64, confine=2.0, generator=generator)
    with torch.no_grad():
        for p in energy.net[0].parameters():
            p.mul_(4)
    return energy


def fit(energy: nn.Module, n_iterations: int, learning_rate: float, loss_of: Callable[[], Tensor]) -> nn.Module:
    """Adam with warm-up and cosine on a loss; returns the running average of the weights."""
    optimizer, average = torch.optim.Adam(energy.parameters(), lr=learning_rate), copy.deepcopy(energy)
    for i in range(n_iterations):
        factor = min((i + 1) / 30, 0.5 * (1 + math.cos(math.pi * i / n_iterations)))
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), energy.parameters(), strict=True):
                a.lerp_(p, 0.01)
    return average


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["mixture", "moons"])
def test_contrastive_divergence_is_close_to_the_oracle(
    name: str, seed: int, make_generator: Factory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Target: KL(data ‖ CD) − KL(data ‖ oracle) ≤ 0.05 nats on held-out data, CD trained in at most 60 s."""
    target = toy(name)
    x_train, x_held = (target.sample(10_000, make_generator(1000 * s + seed)) for s in (1, 2))

    def batch(n: int, g: torch.Generator) -> Tensor:
        return x_train[torch.randint(len(x_train), (n,), generator=g)]

    start = time.perf_counter()
    energy, g, sampler = steep_energy(make_generator(seed)), make_generator(seed), Langevin(0.01, 10)
    assert sampler.implied_temperature == pytest.approx(1.0)
    buffer = ReplayBuffer.create(4096, uniform, g)

    def cd_step() -> Tensor:
        x_pos = batch(256, g)
        x_neg = negatives_from_buffer(sampler, energy, buffer, 256, uniform, 0.01, g)
        return cd_loss(*energy(torch.cat([x_pos, x_neg])).chunk(2), alpha=0.05).loss

    by_cd = fit(energy, 800, 5e-3, cd_step)
    seconds = time.perf_counter() - start

    oracle, g_oracle = steep_energy(make_generator(seed)), make_generator(seed)
    points = make_grid([(-6, 6)] * 2, 64).points.float()

    def exact_step() -> Tensor:
        return oracle(batch(1024, g_oracle)).mean() + torch.logsumexp(-oracle(points), 0)

    fit(oracle, 400, 1e-2, exact_step)  # its own weights: without sampling noise the average is not needed

    def log_prob(model: nn.Module) -> Tensor:
        model = model.double()
        log_z = log_partition(model, [(-10.0, 10.0)] * 2, rtol=1e-5)
        with torch.no_grad():
            return log_density(model, x_held.double(), log_z)

    truth, log_cd, log_oracle = target.log_prob(x_held.double()), log_prob(by_cd), log_prob(oracle)
    gap = log_oracle - log_cd
    with capsys.disabled():
        print(
            f"\n{name}, seed {seed}: KL(data ‖ oracle) {(truth - log_oracle).mean():.4f}, "
            f"KL(data ‖ CD) {(truth - log_cd).mean():.4f}, "
            f"gap {gap.mean():.4f} ± {gap.std() / len(gap) ** 0.5:.4f} nats, CD {seconds:.1f} s"
        )
    assert gap.mean() <= 0.05
    assert (truth - log_oracle).mean() < 0.015  # the oracle is no straw man
    assert seconds <= 60
