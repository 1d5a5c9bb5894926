"""Accelerated gradients: the energies, gradients and chains of autograd, and autograd for all that is not known."""

import copy
import functools
import gc
import math
import re
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ebm_lit import EnergyCNN, EnergyMLP, Langevin, TrainConfig, energy_and_grad, fast, langevin, uniform_init
from ebm_lit.energy import EnergyShapeError
from ebm_lit.fast import (
    Accelerated,
    Compiled,
    Convolutions,
    Learner,
    Matrices,
    Pixels,
    accelerate,
    choose_engine,
    choose_learner,
)
from ebm_lit.langevin import NonFiniteError
from ebm_lit.training import draw_negatives, init_state, train_step

Factory = Callable[..., torch.Generator]
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 17, 40), (1, 9, 8), (1, 8, 33), (4, 13, 13)]


def network_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> EnergyCNN | EnergyMLP:
    g = torch.Generator().manual_seed(len(shape) + shape[-1])
    net = EnergyCNN(shape, 6, 10, generator=g) if len(shape) == 3 else EnergyMLP(shape[0], 16, 3, generator=g)
    return net.to(dtype)


def agree(kind: type[Any], network: Any, n: int, dtype: torch.dtype, device: torch.device) -> None:
    """Twice in a row, because the second call finds the first one's numbers in its buffers."""
    network = network.to(device)
    shape = network.shape if isinstance(network, EnergyCNN) else (network.dim,)
    engine = Accelerated(network, kind, torch.empty(n, *shape, dtype=dtype, device=device), None).refresh()
    rtol = 1e-11 if dtype == torch.float64 else 2e-5  # some hundred roundings of 2⁻⁵³ and of 2⁻²⁴
    for seed in (0, 1):
        x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)
        e, grad = engine.energy_and_grad(x)
        e_plain, grad_plain = energy_and_grad(network, x)
        assert torch.allclose(e, e_plain, rtol=rtol, atol=rtol)
        assert (grad - grad_plain).abs().max() <= rtol * grad_plain.abs().max()
        with torch.no_grad():
            e_first, first = engine.engine().clone(), engine.engine.grad.clone()
            engine.engine.grad.zero_()
            sums = torch.full((2,), math.nan, dtype=dtype, device=device)
            engine.engine.gradient(sums)  # the step without energies: the same bits
        assert torch.equal(engine.engine.grad, first)
        confine = getattr(network, "confine", None)
        lean = confine is not None and device.type == "cpu"
        left = engine.engine.x.square() / (2 * confine**2) if lean else e_first
        scale = torch.stack([left.abs().sum(), first.abs().sum()])
        assert ((sums - torch.stack([left.sum(), first.sum()])).abs() <= rtol * scale).all()


@pytest.mark.parametrize("kind", [Pixels, Convolutions, Matrices])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_engines_compute_energy_and_gradient_of_images(kind: type[Any], shape: tuple[int, ...], device: torch.device):
    if kind is not Matrices or math.prod(shape) < 1500:
        agree(kind, network_of(shape), 5, torch.float64, device)


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_blocks_of_any_number_of_images(n: int, device: torch.device):
    agree(Pixels, network_of((1, 28, 28), torch.float32), n, torch.float32, device)


@pytest.mark.parametrize("n", [1, 511, 513, 1300])
@pytest.mark.parametrize("confine", [None, 2.0, 0.5])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_engine_of_points(
    n: int, confine: float | None, depth: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Matrices, "block", 512)
    agree(Matrices, EnergyMLP(3, 8, depth, confine).double(), n, torch.float64, device)


def test_a_wrong_engine_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """The comparison above can fail: with the slope of a sigmoid, or a kernel row that is left out."""
    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(fast, "_swish_back", lambda g, z, out: torch.mul(g, z.sigmoid(), out=out))
        agree(Pixels, network_of((1, 28, 28)), 3, torch.float64, torch.device("cpu"))
    forward = fast._Strided.forward

    def short(self: Any, out: Tensor) -> None:
        self.products.pop()
        forward(self, out)

    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(fast._Strided, "forward", short)
        agree(Pixels, network_of((1, 28, 28)), 3, torch.float64, torch.device("cpu"))


# Who is accelerated, and who is not


class Confined(EnergyCNN):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.flatten(1).square().sum(1)


def changed(change: str) -> Any:
    net = Confined() if change == "subclass" else EnergyCNN()
    if change == "another layer":
        net.net[1] = nn.Softplus()
    elif change == "a hook":
        net.net[0].register_forward_hook(lambda *_: None)
    elif change == "a hook of the network":
        net.register_forward_pre_hook(lambda *_: None)
    elif change == "spectral norm":
        nn.utils.parametrizations.spectral_norm(net.net[2])
    elif change == "a function":
        return lambda x: x.flatten(1).square().sum(1)
    elif change == "another type":
        net.double()
    elif change == "dilated":
        net.net[2] = nn.Conv2d(32, 64, 3, stride=2, padding=2, dilation=2)
    elif change == "no bias":
        net.net[2] = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
    elif change == "another stride":
        net.net[2] = nn.Conv2d(32, 64, 3, stride=1, padding=1)
        net.net[4] = nn.Conv2d(64, 128, 3, stride=4, padding=1)
    elif change == "one layer more":
        net.net.append(nn.Linear(1, 1))
    elif change == "its own forward":
        net.forward = lambda x: x.flatten(1).sum(1)
    return net


CHANGES = ["subclass", "another layer", "a hook", "a hook of the network", "spectral norm", "a function"]
CHANGES += ["another type", "dilated", "no bias", "another stride", "one layer more", "its own forward"]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_network_as_it_was_built_is_left_to_autograd(change: str):
    energy = changed(change)
    walk_on, report = accelerate(energy, torch.zeros(2, 1, 28, 28))
    assert walk_on is energy and report.startswith("autograd: ")


def test_networks_of_ours_and_their_averages_are_accelerated(device: torch.device):
    for net in (EnergyCNN(), EnergyCNN((1, 8, 8)), EnergyMLP()):
        net.to(device)
        shape = net.shape if isinstance(net, EnergyCNN) else (net.dim,)
        for energy in (net, AveragedModel(net)):
            walk_on, report = accelerate(energy, torch.zeros(2, *shape, device=device))
            assert isinstance(walk_on, Accelerated) and report in ("pixel rows", "matrices", "convolutions")
        assert accelerate(net, torch.zeros(2, *shape, device=device), "off") == (net, "autograd")
    with torch.autocast(device.type, torch.bfloat16):
        kind, why = choose_engine(EnergyMLP().to(device), torch.zeros(2, 2, device=device))
    assert kind is None and why == "autocast is on"


def test_an_energy_may_bring_its_own_gradient():
    class Spring:
        def __call__(self, x: Tensor) -> Tensor:
            return x.square().sum(1) / 2

        def energy_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self(x), 3 * x  # a lie, so that we can tell who was asked

    x = torch.ones(2, 3)
    assert torch.equal(energy_and_grad(Spring(), x)[1], 3 * x)
    assert torch.equal(Langevin(0.1, 1, temperature=0.0).sample(Spring(), x), x - 0.1 * 3 * x)


def test_parts_of_several_cores_are_the_same_examples(monkeypatch: pytest.MonkeyPatch):
    """Two parts side by side, and one part when a block would be shorter: no example lands in another's place."""
    monkeypatch.setattr(Matrices, "block", 512)
    net = EnergyMLP(3, 8, 2).double()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for n in (2, 6, 7, 1024, 1026, 2048, 2050):
            agree(Matrices, net, n, torch.float64, torch.device("cpu"))
        x = torch.randn(64, 3, generator=generator(), dtype=torch.float64)
        chains = [Langevin(0.05, 9, accelerate=mode).run(net, x, generator=generator(1)) for mode in ("auto", "off")]
        torch.testing.assert_close(chains[0].x, chains[1].x, rtol=0, atol=1e-12)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("n", [1, 2, 40])
@pytest.mark.parametrize("shape", [(1,), (2,), (1, 8, 8), (1, 28, 28)], ids=str)
def test_a_result_is_not_overwritten_by_the_next_chain(shape: tuple[int, ...], n: int):
    """Chains that share an accelerated network share its buffers, and nothing that they return is one."""
    x = uniform_init(n, shape, generator=generator())
    walk_on, _ = accelerate(network_of(shape, torch.float32), x)
    first = Langevin(0.1, 3).run(walk_on, x, generator=generator(1), trajectory=3)
    e, grad = walk_on.energy_and_grad(x)
    kept = [t.clone() for t in (first.x, first.trajectory, e, grad)]
    Langevin(0.1, 3).run(walk_on, -x, generator=generator(2))
    walk_on.energy_and_grad(-x)
    assert all(torch.equal(a, b) for a, b in zip(kept, (first.x, first.trajectory, e, grad), strict=True))


def test_starts_may_lie_in_memory_as_they_like():
    x = torch.randn(2, 3, 40, generator=generator()).permute(2, 0, 1)[:, :, 0]  # (40, 2), not contiguous
    net = EnergyMLP(generator=generator())
    chains = [Langevin(0.1, 4).sample(net, start, generator=generator(1)) for start in (x, x.contiguous())]
    assert torch.equal(*chains) and chains[0].is_contiguous()


# Chains


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (2,), (3,)], ids=str)
@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("n", [5, 64])
def test_the_same_chain_step_by_step(shape: tuple[int, ...], clip: float | None, n: int):
    """Same seed, same noise: states differ by rounding only, at every one of 23 steps, in float64."""
    net, x = network_of(shape), uniform_init(n, shape, generator=generator()).double()
    sampler = Langevin(0.5 if len(shape) == 3 else 0.02, 23, noise_scale=0.05, grad_clip=clip, bounds=(-1, 1))
    off = Langevin(**{**vars(sampler), "accelerate": "off"})
    ours, plain = (s.run(net, x, generator=generator(1), trajectory=24, diagnostics=True) for s in (sampler, off))
    assert plain.engine == "autograd" and ours.engine in ("pixel rows", "matrices")
    assert len(ours.trajectory) == 24
    torch.testing.assert_close(ours.trajectory, plain.trajectory, rtol=0, atol=1e-12)
    for a, b in zip(ours.diagnostics, plain.diagnostics, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(2,), (3,), (1, 8, 8)], ids=str)
def test_noise_drawn_in_blocks_is_the_noise_drawn_step_by_step(shape: tuple[int, ...]):
    """An energy without slope: only noise moves the chains, and a hundred steps need several blocks."""
    flat: Any = lambda x: 0 * x.flatten(1).sum(1)  # noqa: E731
    x, g = torch.zeros(40, *shape), generator(2)
    moved = Langevin(1.0, 1100, noise_scale=0.1).sample(flat, x, generator=generator(2))
    for _ in range(1100):
        x = x + 0.1 * torch.randn(x.shape, generator=g)
    assert torch.equal(moved, x)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [7, 16, 24, 40])
@pytest.mark.parametrize("shape", [(2,), (1, 28, 28)], ids=str)
def test_chains_of_several_blocks(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], n: int, threads: int):
    """Blocks of seven a core walk many steps each, the last may be shorter, and ages anneal every chain differently."""
    monkeypatch.setattr(Matrices, "block", 7)
    monkeypatch.setattr(Pixels, "block", 7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        net, x = network_of(shape), uniform_init(n, shape, generator=generator()).double()
        ages = torch.arange(n) % 13
        sampler = Langevin(0.02, 19, noise_scale=0.05, bounds=(-1, 1), noise_start=0.2, anneal_steps=12)
        off = Langevin(**{**vars(sampler), "accelerate": "off"})
        plain = off.run(net, x, generator=generator(1), ages=ages, trajectory=20, diagnostics=True)
        quick = sampler.run(net, x, generator=generator(1), ages=ages)
        watched = sampler.run(net, x, generator=generator(1), ages=ages, trajectory=20, diagnostics=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(quick.x, watched.x) and quick.engine in ("pixel rows", "matrices")
    torch.testing.assert_close(watched.trajectory, plain.trajectory, rtol=0, atol=1e-12)
    for a, b in zip(watched.diagnostics, plain.diagnostics, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_bad_number_in_any_block_is_reported_with_its_step(monkeypatch: pytest.MonkeyPatch):
    """One chain of the second of three blocks explodes, doubling sixfold with each step, until its square overflows."""
    monkeypatch.setattr(Matrices, "block", 8)
    x, net = torch.zeros(24, 2), EnergyMLP(2, 8, 2, confine=1.0)
    x[9, 0] = 1.0
    errors = {}
    for mode in ("auto", "off"):
        with pytest.raises(NonFiniteError) as found:
            Langevin(8.0, 60, temperature=0.0, accelerate=mode).run(net, x * 1e9)
        errors[mode] = str(found.value)
    assert errors["auto"] == errors["off"] and re.match("the energy .* at step [1-9]", errors["auto"]), errors


@pytest.mark.parametrize("eta", [35.0, 40.0, 100.0])
def test_the_alarm_names_the_same_step_whoever_computes_and_whoever_watches(eta: float):
    """Points that run away by a factor of 1.2 to 5 a step, slowly enough to tell an alarm that rings early."""
    x, net = torch.randn(1024, 2, generator=generator()), EnergyMLP(2, 8, 2, generator=generator(1))
    errors = set()
    for mode, diagnostics in (("auto", False), ("auto", True), ("off", False)):
        with pytest.raises(NonFiniteError) as found:
            Langevin(eta, 600, temperature=0.0, accelerate=mode).run(net, x, diagnostics=diagnostics)
        errors.add(str(found.value))
    assert len(errors) == 1 and re.match("the energy .* at step [1-9]", errors.pop())


def test_energies_that_are_numbers_set_off_no_alarm():
    """All squares together would overflow; the energies, a two-millionth of them, do not."""
    x, net = torch.full((1024, 2), 1e18), EnergyMLP(2, 8, 2, confine=1000.0)
    ours, plain = (Langevin(1e-3, 4, temperature=0.0, accelerate=mode).sample(net, x) for mode in ("auto", "off"))
    torch.testing.assert_close(ours, plain)


def test_what_an_earlier_block_left_behind_is_not_watched(monkeypatch: pytest.MonkeyPatch):
    """The last move of one chain in the second block makes its square overflow; the third block is shorter."""
    monkeypatch.setattr(Matrices, "block", 6 // torch.get_num_threads())
    x, net = torch.zeros(16, 2), EnergyMLP(2, 8, 2, confine=1.0)
    assert accelerate(net, x)[0].rows == 6, "no block is shorter than the others"
    x[11, 0] = 1e18  # seven times as large after each step
    ours, plain = (Langevin(8.0, 2, temperature=0.0, accelerate=mode).sample(net, x) for mode in ("auto", "off"))
    assert 1e19 < ours.abs().max() < math.inf
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("confine", [None, 1.0])
@pytest.mark.parametrize("images", [False, True])
def test_an_energy_that_overflows_alone_is_reported_with_its_step(confine: float | None, images: bool):
    """A last layer so steep that the energy overflows while everything else is a number: clipped chains walk on."""
    g = generator()
    net = EnergyCNN((1, 8, 8), 6, 10, generator=g) if images else EnergyMLP(2, 8, 2, confine=confine, generator=g)
    with torch.no_grad():
        net.net[-1].weight.mul_(2e37 / net.net[-1].weight.abs().max())
    x = torch.ones(8, *(net.shape if images else (2,)))  # of 16 numbers the noise is drawn many steps at once
    errors = {}
    for mode in ("auto", "off"):
        with pytest.raises(NonFiniteError) as found:
            Langevin(5.0, 400, temperature=0.0, grad_clip=1.0, accelerate=mode).run(net, -x if images else x)
        errors[mode] = str(found.value)
    assert errors["auto"] == errors["off"] and re.match("the energy .* at step [1-9]", errors["auto"]), errors


@pytest.mark.parametrize("trajectory", [0, 5])
def test_an_energy_that_no_step_asks_for_is_looked_at_when_a_chain_begins(trajectory: int):
    """The last bias reaches no gradient: only the energy can tell that it is no number."""
    net = EnergyMLP()
    with torch.no_grad():
        net.net[-1].bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"the energy .* at step 0"):
        Langevin(0.1, 30).run(net, torch.zeros(16, 2), generator=generator(), trajectory=trajectory)


def test_a_chain_leaves_nothing_behind():
    """Buffers go when the chain is done, not when Python's collector next looks for cycles."""
    net, x = EnergyMLP(), torch.zeros(16, 2)
    walk_on, _ = accelerate(net, x)
    gone = weakref.ref(walk_on.engine)
    gc.disable()
    try:
        Langevin(0.1, 3).run(walk_on, x, generator=generator(), trajectory=2, diagnostics=True)
        del walk_on
        assert gone() is None
    finally:
        gc.enable()


def test_weights_are_those_of_the_moment():
    net, x = EnergyMLP(), torch.randn(16, 2, generator=generator())
    walk_on, _ = accelerate(net, x)
    before = Langevin(0.1, 3, temperature=0.0).sample(walk_on, x)
    with torch.no_grad():
        net.net[0].weight.mul_(2)
    after = Langevin(0.1, 3, temperature=0.0).sample(walk_on, x)
    assert not torch.equal(before, after)
    assert torch.equal(after, Langevin(0.1, 3, temperature=0.0).sample(net, x))
    assert len(Langevin(0.1, 3).sample(walk_on, x[:5])) == 5  # another batch gets buffers of its own


def test_no_trace_on_the_network_and_non_finite_numbers_are_reported():
    net = EnergyCNN((1, 8, 8)).train()
    net.net[0].weight.requires_grad_(False)
    net.net[0].bias.grad = torch.ones(32)
    x = torch.rand(4, 1, 8, 8)
    with torch.inference_mode():
        assert Langevin(1.0, 2).run(net, x).engine == "matrices"
    assert net.training and not net.net[0].weight.requires_grad and net.net[0].bias.requires_grad
    assert torch.equal(net.net[0].bias.grad, torch.ones(32)) and net.net[2].weight.grad is None
    with torch.no_grad():
        net.net[2].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="energy became NaN or infinite at step 0 of 2"):
        Langevin(1.0, 2).run(net, x)


def test_training_keeps_one_accelerated_network_and_follows_its_weights():
    x = torch.rand(100, 1, 8, 8, generator=generator()) * 2 - 1
    config = TrainConfig(n_iterations=3, batch_size=16, buffer_size=16, width=4, hidden=8, n_steps=4)
    states = [init_state(TrainConfig(**{**vars(config), "accelerate": mode}), x) for mode in ("auto", "off")]
    for _ in range(3):
        negatives = [draw_negatives(state, x[:16]).x for state in states]
        torch.testing.assert_close(*negatives, rtol=0, atol=1e-4)
        kept = states[0].walk_on
        for state in states:
            for p in state.energy.parameters():
                p.data *= 1.5
    assert isinstance(kept, Accelerated) and states[0].walk_on is kept and states[1].walk_on is states[1].energy


# Gradients of the weights


def learned(net: EnergyCNN, seeds: tuple[int, ...] = (0, 1)) -> None:
    """Energies and gradients of the weights are autograd's, twice in a row, for a loss that is not a sum."""
    learner = Learner(net, torch.empty(6, *net.shape, dtype=torch.float64))
    for seed in seeds:
        x = torch.randn(6, *net.shape, generator=generator(seed), dtype=torch.float64)
        losses = {}
        for name in ("autograd", "by hand"):
            net.zero_grad()
            e = net(x) if name == "autograd" else learner.energies(x)
            (e[:3].mean() - e[3:].mean() + e.square().mean() + e[0] * e[1]).backward()
            if name == "by hand":
                learner.backward(e.grad)
            losses[name] = e.detach(), [p.grad.clone() for p in net.parameters()]
        (e, plain), (e_fast, quick) = losses.values()
        torch.testing.assert_close(e_fast, e, rtol=1e-11, atol=1e-11)  # some hundred roundings of 2⁻⁵³
        for a, b in zip(quick, plain, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() <= 1e-11 * b.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_weights_are_autograds(shape: tuple[int, ...]):
    learned(network_of(shape))


def test_a_wrong_gradient_of_the_weights_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """With a row of a kernel that learns nothing, and with slopes that are left out."""
    init = fast._Strided.__init__

    def short(self: Any, *args: Any) -> None:
        init(self, *args)
        self.learn_products.pop()

    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(fast._Strided, "__init__", short)
        learned(network_of((1, 28, 28)))
    backward = Pixels.backward
    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(Pixels, "backward", lambda self, slopes=None: backward(self))
        learned(network_of((1, 28, 28)))


def test_a_learner_is_for_networks_as_they_were_built(device: torch.device):
    net, x = EnergyCNN().to(device), torch.zeros(4, 1, 28, 28, device=device)
    assert isinstance(choose_learner(net, x, "auto"), Learner) == (device.type == "cpu")
    assert choose_learner(net, x, "off") is None and choose_learner(net, x, "compile") is None
    assert choose_learner(EnergyMLP().to(device), torch.zeros(4, 2, device=device), "auto") is None
    assert all(
        choose_learner(changed(c), torch.zeros(4, 1, 28, 28), "auto") is None for c in CHANGES if c != "a function"
    )


def test_hooks_of_parameters_and_late_changes_go_to_autograd():
    net, x = EnergyCNN(), torch.zeros(4, 1, 28, 28)
    learner = choose_learner(net, x, "auto")
    assert (
        choose_learner(net, x, "auto", learner) is learner
        and choose_learner(net, x[:2], "auto", learner) is not learner
    )
    for attach in (
        lambda: net.net[2].weight.register_hook(lambda g: 0 * g),
        lambda: net.net[0].bias.register_post_accumulate_grad_hook(lambda _: None),
        lambda: net.net[4].register_forward_hook(lambda *_: None),
    ):
        handle = attach()
        assert choose_learner(net, x, "auto", learner) is None
        handle.remove()
        assert choose_learner(net, x, "auto", learner) is learner
    net.requires_grad_(False)
    assert choose_learner(net, x, "auto", learner) is None


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_training_by_hand_and_by_autograd_is_the_same_run(minibatches: int, last: bool):
    """Five iterations at 28×28, from the same seed: weights, averages, moments and history agree to rounding."""
    x = torch.rand(40, 1, 28, 28, generator=generator()) * 2 - 1
    states = []
    for mode in ("auto", "off"):
        config = TrainConfig(5, 16, minibatches, accelerate=mode, width=4, hidden=8, n_steps=2, buffer_size=16)
        net = EnergyCNN((1, 28, 28), 4, 8, generator())
        state = init_state(config, x, net.to(memory_format=torch.channels_last) if last else net)
        state.energy.net[0].bias.requires_grad_(False)  # what is frozen stays as it is
        for _ in range(5):
            train_step(state, x)
        states.append(state)
    ours, plain = states
    assert isinstance(ours.learner, Learner) and plain.learner is None
    assert torch.equal(ours.energy.net[0].bias, plain.energy.net[0].bias)
    torch.testing.assert_close(ours.history[:5], plain.history[:5], rtol=1e-3, atol=1e-5)
    for a, b in zip(ours.ema.parameters(), plain.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # Adam's first steps turn rounding into a part of a step


# The compiler, and other arithmetic


def wells(x: Tensor) -> Tensor:
    return (x.square() - 1).square().sum(1)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the real compiler, but run as it is: compiling takes longer than all of this file."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("n", "n_steps"), [(5, 11), (32, 1), (32, 3), (32, 11)])  # 5 numbers are drawn by themselves
@pytest.mark.parametrize(
    "settings", [{}, {"grad_clip": 0.3, "bounds": (-1, 1)}, {"noise_start": 0.5, "anneal_steps": 7}], ids=str
)
def test_compiled_steps_are_the_plain_ones(settings: dict[str, Any], n: int, n_steps: int):
    x = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None]
    off, on = (Langevin(0.01, n_steps, accelerate=mode, **settings) for mode in ("off", "compile"))
    for energy in (wells, network_of((1,))):
        plain, watched = (
            s.run(energy, x, generator=generator(), trajectory=n_steps + 1, diagnostics=True) for s in (off, on)
        )
        last = on.run(energy, x, generator=generator())
        said = "compiled" if n_steps == 1 else f"compiled, {min(n_steps, 4)} steps at once"
        assert last.engine == watched.engine == said
        near = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        near(watched.trajectory, plain.trajectory)
        near(last.x, plain.x)
        for a, b in zip(watched.diagnostics or (), plain.diagnostics or (), strict=True):
            near(a, b)


@pytest.mark.usefixtures("traced")
def test_compiled_chains_name_the_same_bad_step_and_no_spare_one():
    """Descent of a quartic with too large a step runs away; the steps that only fill a call up do not count."""
    x = torch.full((16, 1), 3.0)

    def outcome(n_steps: int, mode: Any) -> str:
        try:
            return str(Langevin(0.5, n_steps, temperature=0.0, accelerate=mode).run(wells, x).x[0].item())
        except FloatingPointError as error:
            return str(error)

    found = [(outcome(n, "off"), outcome(n, "compile")) for n in range(1, 12)]
    assert all(plain == ours for plain, ours in found)
    assert 0 < sum("infinite at step" in plain for plain, _ in found) < 11
    blown = [n for n, (plain, _) in enumerate(found, start=1) if "infinite" not in plain]
    assert blown[-1] % 4  # its call has spare steps


@pytest.mark.usefixtures("traced")
def test_whoever_keeps_a_compiled_energy_keeps_its_steps():
    x = torch.linspace(-1, 1, 16)[:, None]
    walk_on, _ = accelerate(wells, x, "compile")
    assert isinstance(walk_on, Compiled)
    sampler, gone = Langevin(0.01, 6, accelerate="compile"), weakref.ref(walk_on)
    first = sampler.sample(walk_on, x, generator=generator())
    steps = walk_on.steps
    assert torch.equal(Langevin(0.01, 6, accelerate="compile").sample(walk_on, x, generator=generator()), first)
    assert walk_on.steps is steps
    hot = Langevin(0.02, 6, accelerate="compile")
    assert torch.equal(hot.sample(walk_on, x, generator=generator()), hot.sample(wells, x, generator=generator()))
    assert walk_on.steps is not steps
    gc.disable()
    try:
        del walk_on
        assert gone() is None  # no cycle: its memory comes back at once
    finally:
        gc.enable()


class Scaled(Langevin):
    """Two of them compare as equal, whatever their factor."""

    def __init__(self, factor: float, **settings: Any) -> None:
        super().__init__(**settings)
        object.__setattr__(self, "factor", factor)

    def clip(self, grad: Tensor) -> Tensor:
        return grad * self.factor  # type: ignore[attr-defined, no-any-return]


@pytest.mark.usefixtures("traced")
def test_compiled_steps_of_a_subclass_are_its_own():
    x = torch.linspace(-1, 1, 16)[:, None]
    walk_on, _ = accelerate(wells, x, "compile")
    for factor in (1.0, 5.0, 1.0):
        ours, plain = (Scaled(factor, step_size=0.01, n_steps=6, accelerate=mode) for mode in ("compile", "off"))
        found = ours.run(walk_on, x, generator=generator())
        assert found.engine == "compiled, 4 steps at once"
        torch.testing.assert_close(found.x, plain.sample(wells, x, generator=generator()), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("traced")
def test_threads_may_share_a_compiled_energy():
    x = torch.linspace(-2, 2, 32, dtype=torch.float64)[:, None]
    walk_on, _ = accelerate(wells, x, "compile")
    samplers = [Langevin(eta, 41, accelerate="compile") for eta in (0.01, 0.02)]
    for sampler in samplers:
        sampler.sample(walk_on, x)  # compiles

    def walk(seed: int) -> Tensor:
        return samplers[seed % 2].run(walk_on, x, generator=generator(seed), trajectory=3).x

    with ThreadPoolExecutor(4) as pool:
        chains = list(pool.map(walk, range(24)))
    for seed, found in enumerate(chains):
        off = Langevin(samplers[seed % 2].step_size, 41, accelerate="off")
        torch.testing.assert_close(found, off.sample(wells, x, generator=generator(seed)), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("traced")
def test_a_copy_of_a_compiled_energy_has_a_network_of_its_own():
    x = torch.linspace(-1, 1, 16, dtype=torch.float64)[:, None]
    walk_on, _ = accelerate(network_of((1,)), x, "compile")
    assert isinstance(walk_on, Compiled)
    sampler, off = (Langevin(0.05, 6, accelerate=mode) for mode in ("compile", "off"))
    before = sampler.sample(walk_on, x, generator=generator())
    twin = copy.deepcopy(walk_on)
    with torch.no_grad():
        for p in twin.network.parameters():  # type: ignore[attr-defined]
            p.mul_(2)
    found = sampler.sample(twin, x, generator=generator())
    torch.testing.assert_close(found, off.sample(twin.network, x, generator=generator()), rtol=0, atol=1e-12)
    assert torch.equal(sampler.sample(walk_on, x, generator=generator()), before) and not torch.equal(found, before)


@pytest.mark.usefixtures("traced")
def test_a_compiled_energy_keeps_its_own_gradient():
    class Bent:
        """A gradient that autograd would not find."""

        def __call__(self, x: Tensor) -> Tensor:
            return x.square().sum(1)

        def energy_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self(x), 3 * x

    x, n = torch.ones(16, 1), 5
    for mode in ("off", "compile"):
        chain = Langevin(0.1, n, temperature=0.0, accelerate=mode).run(Bent(), x)  # type: ignore[arg-type]
        torch.testing.assert_close(chain.x, 0.7**n * x)


@pytest.mark.usefixtures("traced")
def test_what_is_wrong_with_an_energy_is_said_before_it_is_compiled():
    x, sampler = torch.ones(16, 2), Langevin(0.1, 5, accelerate="compile")
    with pytest.raises(EnergyShapeError, match=r"^energy returned \(16, 1\)"):
        sampler.run(lambda x: x.sum(1, keepdim=True), x)
    with pytest.raises(ValueError, match=r"^the energy is cut off from x"):
        sampler.run(lambda x: x.detach().sum(1), x)

    def picky(x: Tensor) -> Tensor:
        if x.shape[1] == 4:
            raise ValueError("not four")
        return x.square().sum(1, keepdim=x.shape[1] == 3)

    walk_on, _ = accelerate(picky, x, "compile")
    good = sampler.run(walk_on, x, generator=generator())
    with pytest.raises(EnergyShapeError, match=r"^energy returned \(16, 1\)"):
        sampler.run(walk_on, torch.ones(16, 3))
    with pytest.raises(ValueError, match="not four"):
        sampler.run(walk_on, torch.ones(16, 4))
    again = sampler.run(walk_on, x, generator=generator())
    assert torch.equal(again.x, good.x) and again.engine == good.engine == "compiled, 4 steps at once"


@pytest.mark.usefixtures("traced")
def test_breaks_in_the_graph_and_too_many_variants_are_reported():
    def curious(x: Tensor) -> Tensor:
        return x.square().sum(1) if x.sum().item() > 0 else x.sum(1)

    x = torch.ones(16, 1)
    chain = Langevin(0.1, 5, accelerate="compile").run(curious, x, generator=generator())
    assert chain.engine.startswith("autograd: torch.compile failed (")
    assert torch.equal(chain.x, Langevin(0.1, 5).sample(curious, x, generator=generator()))
    walk_on, _ = accelerate(wells, x, "compile")
    with torch._dynamo.config.patch(recompile_limit=2):
        samplers = [Langevin(0.1, 5, grad_clip=1.0 + k, accelerate="compile") for k in range(4)]
        said = [sampler.run(walk_on, x).engine for sampler in samplers]
        assert said[:2] == ["compiled, 4 steps at once"] * 2
        assert all(word.endswith("too many variants, torch.compiler.reset() forgets them)") for word in said[2:])
        torch.compiler.reset()
        assert samplers[3].run(walk_on, x).engine == said[0]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no C++ compiler\n(long)"), "RuntimeError: no C++ compiler"),
        (AssertionError(), "AssertionError: "),
    ],
    ids=["message", "none"],
)
def test_a_compiler_that_fails_is_reported_and_done_without(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any, **__: Any) -> Any:
        def call(*_: Tensor) -> Tensor:
            raise error

        return call

    monkeypatch.setattr(torch, "compile", broken)
    x = torch.ones(4, 1)
    ours = Langevin(0.01, 5, accelerate="compile").run(wells, x, generator=generator())
    assert ours.engine == f"autograd: torch.compile failed ({said})"
    assert torch.equal(ours.x, Langevin(0.01, 5).sample(wells, x, generator=generator()))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler")
def test_the_real_compiler():
    x = torch.randn(256, 2, generator=generator())
    plain, ours = (
        Langevin(0.01, 50, accelerate=mode).run(EnergyMLP(generator=generator()), x, generator=generator(1))
        for mode in ("off", "compile")
    )
    assert ours.engine == "compiled, 4 steps at once"
    torch.testing.assert_close(ours.x, plain.x, rtol=0, atol=1e-5)


def test_arithmetic_of_another_type():
    """bfloat16 keeps eight bits: gradients within a few per cent, the chain's state itself stays float32."""
    net, x = EnergyMLP(generator=generator()), torch.randn(64, 2, generator=generator())
    chains = [Langevin(0.05, 20, temperature=0.0, gradient_dtype=d).run(net, x) for d in (None, torch.bfloat16)]
    assert [c.x.dtype for c in chains] == [torch.float32] * 2 and not torch.equal(chains[0].x, chains[1].x)
    moved = (chains[0].x - x).norm()
    assert (chains[0].x - chains[1].x).norm() < 0.03 * moved
    double = Langevin(0.05, 20, temperature=0.0, gradient_dtype=torch.float64).sample(net, x)
    torch.testing.assert_close(double, chains[0].x, rtol=0, atol=1e-5)


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match=r"^accelerate must be one of \('auto', 'compile', 'off'\), got 'fast'$"):
        Langevin(1.0, accelerate="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^accelerate must be one of"):
        accelerate(wells, torch.zeros(1, 1), "on")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^gradient_dtype must be a floating-point dtype or None"):
        Langevin(1.0, gradient_dtype=torch.int32)


# Graphs that are kept, on a machine that has none: what a replay would do again is done again


def addresses(walk: Any) -> list[int]:
    """Of all memory that a recording of this walk would read or write."""
    track = walk.func.__self__
    tensors = [track.state, track.drawn, track.sums, track.eta, track.sigmas]
    if track.blocks is not None:
        engine = track.blocks.engine
        tensors += [engine.x, track.blocks.noise, track.blocks.spare]
        for part in (getattr(engine, "dense", None), *(getattr(engine, name, None) for name in ("stem", "head"))):
            known = {} if part is None else vars(part)
            tensors += [t for v in known.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
    return [t.data_ptr() for t in tensors if t is not None]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each recording had. Like a real one it moves no chain and knows addresses, not names."""
    lengths: list[int] = []

    def capture(walk: Callable[[int, int], None], m: int, device: torch.device) -> Callable[[], None]:
        walk(0, min(2, m))
        lengths.append(m)
        places = addresses(walk)

        def replay() -> None:
            assert addresses(walk) == places
            walk(0, m)

        return replay

    monkeypatch.setattr(langevin, "_takes_graphs", lambda x: True)
    monkeypatch.setattr(langevin, "_capture", capture)
    return lengths


def walked(sampler: Langevin, energy: Any, x: Tensor, seed: int, ages: int = 0) -> Tensor:
    return sampler.sample(energy, x, generator=generator(seed), ages=ages)


@pytest.mark.parametrize("hot", [{}, {"noise_start": 0.2, "anneal_steps": 50}], ids=["", "annealed"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (2,)], ids=str)
def test_whoever_keeps_an_energy_keeps_the_whole_chain_as_one_graph(
    shape: tuple[int, ...], hot: dict[str, Any], recorded: list[int]
):
    net = network_of(shape)
    starts = [torch.rand(16, *shape, generator=generator(s), dtype=torch.float64) * 2 - 1 for s in (3, 4)]
    sampler = Langevin(0.02, 30, noise_scale=0.05, bounds=(-1, 1), **hot)
    off = Langevin(**{**vars(sampler), "accelerate": "off"})
    walk_on, _ = accelerate(net, starts[0])
    near = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-11)
    first = sampler.run(walk_on, starts[0], generator=generator(1))
    assert first.engine.endswith(" in CUDA graphs of 15 steps") and recorded == [15]
    kept = first.x.clone()
    near(first.x, walked(off, net, starts[0], 1))
    second = sampler.run(walk_on, starts[0], generator=generator(1))
    assert second.engine.endswith(" in one CUDA graph of 30 steps") and recorded == [15, 30]
    assert torch.equal(second.x, first.x)  # the same noise, however long the graph is
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    near(walked(sampler, walk_on, starts[1], 2, ages=20), walked(off, net, starts[1], 2, ages=20))
    assert recorded == [15, 30]
    assert torch.equal(first.x, kept) and torch.equal(second.x, kept)  # their states are their own
    near(sampler.run(walk_on, starts[0], generator=generator(1), trajectory=3).x, walked(off, net, starts[0], 1))
    near(walked(sampler, walk_on, starts[1], 5), walked(off, net, starts[1], 5))
    assert recorded == [15, 30]
    other, plain = (Langevin(**{**vars(s), "bounds": (-0.9, 0.9)}) for s in (sampler, off))
    near(walked(other, walk_on, starts[0], 1), walked(plain, net, starts[0], 1))
    assert recorded == [15, 30, 15]
    assert sampler.run(walk_on, starts[0], 0).engine == walk_on.report  # type: ignore[attr-defined]
    for factor in (1.0, 5.0, 5.0):
        ours, theirs = (Scaled(factor, step_size=0.02, n_steps=10, accelerate=mode) for mode in ("auto", "off"))
        near(walked(ours, walk_on, starts[0], 1), walked(theirs, net, starts[0], 1))


@pytest.mark.parametrize(
    ("n_steps", "once", "later"),
    [(7, 7, 7), (20, 20, 20), (47, 15, 47), (250, 15, 250), (499, 15, 245), (300, 20, 150)],
)
def test_few_steps_are_left_over_by_graphs(n_steps: int, once: int, later: int, recorded: list[int]):
    net, x = network_of((2,)), torch.ones(16, 2, dtype=torch.float64)
    walk_on, _ = accelerate(net, x)
    sampler = Langevin(0.01, n_steps)
    plain = walked(Langevin(0.01, n_steps, accelerate="off"), net, x, 0)
    for energy, m in ((walk_on, once), (walk_on, later), (walk_on, later), (net, once), (net, once)):
        chain = sampler.run(energy, x, generator=generator())
        assert chain.engine.endswith(
            f" in one CUDA graph of {m} steps" if m == n_steps else f"CUDA graphs of {m} steps"
        )
        torch.testing.assert_close(chain.x, plain, rtol=0, atol=1e-10)
        assert n_steps % m <= 0.25 * n_steps
    assert recorded == [once, later, once, once]


def test_noise_on_a_gpu_does_not_depend_on_the_length_of_graphs(recorded: list[int], monkeypatch: pytest.MonkeyPatch):
    """There one call for 60 steps gives other numbers than three calls for 20: all chains make the same calls."""
    calls: list[int] = []
    draw = torch.randn

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0][0])
        return draw(*args, **kwargs)

    monkeypatch.setattr(torch, "randn", counted)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    net, x = network_of((2,)), torch.ones(16, 2, dtype=torch.float64)
    walk_on, _ = accelerate(net, x)
    for n_steps in (3, 47, 60, 260):
        found = []
        for energy, watched in ((net, False), (net, True), (walk_on, False), (walk_on, False), (walk_on, True)):
            calls.clear()
            Langevin(0.01, n_steps).run(energy, x, diagnostics=watched)
            found.append(list(calls))
        for mode in ("off", "compile"):
            calls.clear()
            Langevin(0.01, n_steps, accelerate=mode).run(net, x)  # type: ignore[arg-type]
            found.append(list(calls))
        assert all(one == found[0] for one in found) and sum(found[0]) == n_steps


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_kept_graph_survives_a_chain_that_ran_away_and_lets_go_of_its_memory(
    dtype: torch.dtype | None, recorded: list[int], monkeypatch: pytest.MonkeyPatch
):
    net, x = network_of((2,)), torch.ones(16, 2, dtype=torch.float64)
    walk_on, _ = accelerate(net, x, dtype=dtype)
    sampler = Langevin(0.01, 20)
    good = [walked(sampler, walk_on, x, 1) for _ in range(2)]
    with pytest.raises(NonFiniteError, match="x_init"):
        sampler.run(walk_on, x * math.nan)
    assert torch.equal(walked(sampler, walk_on, x, 1), good[1]) and torch.equal(*good) and recorded == [20, 20]
    monkeypatch.setattr(langevin, "_capture", lambda *_: list)  # like a graph it knows memory, and no energy
    walk_on, _ = accelerate(net, x, dtype=dtype)
    gone = weakref.ref(walk_on)
    for _ in range(3):
        sampler.sample(walk_on, x)
    gc.disable()
    try:
        del walk_on
        assert gone() is None  # no cycle: what a GPU lends comes back at once
    finally:
        gc.enable()


def test_a_copy_of_a_kept_energy_has_a_graph_of_its_own(recorded: list[int]):
    net, x = network_of((2,)), torch.ones(16, 2, dtype=torch.float64)
    walk_on, _ = accelerate(net, x)
    sampler = Langevin(0.01, 20)
    before = [walked(sampler, walk_on, x, 1) for _ in range(2)]
    twin = copy.deepcopy(walk_on)
    with torch.no_grad():
        for p in twin.network.parameters():  # type: ignore[attr-defined]
            p.mul_(2)
    plain = walked(Langevin(0.01, 20, accelerate="off"), twin.network, x, 1)  # type: ignore[attr-defined]
    torch.testing.assert_close(walked(sampler, twin, x, 1), plain, rtol=0, atol=1e-11)
    assert recorded == [20, 20, 20] and torch.equal(walked(sampler, walk_on, x, 1), before[1])


def test_a_recording_that_fails_is_reported_and_done_without(recorded: list[int], monkeypatch: pytest.MonkeyPatch):
    reasons = ["operation not permitted when stream is capturing\nmore", ""]

    def capture(walk: Callable[[int, int], None], m: int, device: torch.device) -> Callable[[], None]:
        walk(0, 1)
        raise NotImplementedError(*reasons[:1] if reasons[0] else ())

    monkeypatch.setattr(langevin, "_capture", capture)
    net, x = network_of((2,)), torch.ones(16, 2, dtype=torch.float64)
    walk_on, _ = accelerate(net, x)
    plain = walked(Langevin(0.01, 30, accelerate="off"), net, x, 0)
    while reasons:
        chain = Langevin(0.01, 30).run(walk_on, x, generator=generator())
        assert chain.engine == f"matrices, step by step: no CUDA graph ({reasons.pop(0).partition(chr(10))[0]})"
        torch.testing.assert_close(chain.x, plain, rtol=0, atol=1e-11)


# Where there is a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("anneal_steps", [0, 30])
@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (2,)], ids=str)
def test_chains_in_cuda_graphs(shape: tuple[int, ...], anneal_steps: int, make_generator: Factory):
    net = network_of(shape, torch.float32).cuda()
    x = torch.rand(64, *shape, device="cuda") * 2 - 1
    hot = {"noise_start": 0.2, "anneal_steps": anneal_steps} if anneal_steps else {}
    sampler = Langevin(0.02, 47, noise_scale=0.05, bounds=(-1, 1), **hot)
    off = Langevin(**{**vars(sampler), "accelerate": "off"})
    ours, plain = (s.run(net, x, generator=make_generator(1, "cuda")) for s in (sampler, off))
    assert "CUDA graphs of 15 steps" in ours.engine
    torch.testing.assert_close(ours.x, plain.x, rtol=0, atol=1e-4)
    again = sampler.run(net, x, generator=make_generator(1, "cuda"))
    assert torch.equal(ours.x, again.x)
    walk_on, _ = accelerate(net, x)
    for steps in ("CUDA graphs of 15 steps", "one CUDA graph of 47 steps", "one CUDA graph of 47 steps"):
        kept = sampler.run(walk_on, x, generator=make_generator(1, "cuda"))
        assert steps in kept.engine
        torch.testing.assert_close(kept.x, ours.x, rtol=0, atol=1e-5)  # the same noise; perhaps other kernels
    watched = sampler.run(net, x, generator=make_generator(1, "cuda"), trajectory=5, diagnostics=True)
    torch.testing.assert_close(ours.x, watched.x, rtol=0, atol=1e-5)  # the same noise; perhaps other kernels
    half = Langevin(**{**vars(sampler), "gradient_dtype": torch.bfloat16}).run(
        net, x, generator=make_generator(1, "cuda")
    )
    assert "CUDA graphs of 15 steps" in half.engine
