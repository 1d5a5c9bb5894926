"""The energy networks, the two gradients, freezing, and every error that they promise."""

import copy
import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from ebm_lit.energy import (
    EnergyCNN,
    EnergyMLP,
    EnergyShapeError,
    count_parameters,
    energy_and_grad,
    evaluate_energy,
    frozen,
    score,
    swish,
)

MakeGenerator = Callable[..., torch.Generator]
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 17, 23), (2, 8, 40), (4, 9, 8), (1, 63, 64)]


def spring(x: Tensor) -> Tensor:
    """E(x) = ‖x‖²/2, whose gradient is x."""
    return x.flatten(1).square().sum(1) / 2


def make(kind: str, generator: torch.Generator | None = None) -> nn.Module:
    if kind == "points":
        return EnergyMLP(width=16, generator=generator)
    return EnergyCNN((1, 8, 8), 4, 8, generator=generator)


def batch(kind: str, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (n, 2) if kind == "points" else (n, 1, 8, 8)
    return (2 * torch.rand(shape, generator=generator) - 1).to(dtype)


@pytest.fixture(params=["points", "images"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


class Restless(nn.Module):
    """An energy with a running average and dropout: what freezing must keep still."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


# Swish


def test_swish_by_hand() -> None:
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    assert swish(torch.tensor(0.0)) == 0
    assert torch.equal(swish(x, 0.0), x / 2)
    assert (swish(x) - nn.functional.silu(x)).abs().max() < 1e-14
    assert (swish(x) - swish(-x) - x).abs().max() < 1e-14
    assert (swish(x) + swish(-x) - x * torch.tanh(x / 2)).abs().max() < 1e-13
    for beta in (0.3, 1.0, 7.0):  # its distance from ReLU is 0.27846/β
        distance = (swish(x / beta, beta) - torch.relu(x / beta)).abs().max().item()
        assert math.isclose(distance, 0.278464 / beta, rel_tol=1e-4)


def test_swish_slope_is_finite_and_right() -> None:
    x = torch.tensor([-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4], requires_grad=True)
    (slope,) = torch.autograd.grad(swish(x).sum(), x)
    gate = torch.sigmoid(x.detach())
    assert torch.allclose(slope, gate * (1 + x.detach() * (1 - gate)))
    assert slope[3] == 0.5
    assert gradcheck(swish, torch.linspace(-5, 5, 21, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_swish_keeps_shape_and_dtype(dtype: torch.dtype) -> None:
    for shape in ((), (3,), (2, 1, 4)):
        y = swish(torch.ones(shape, dtype=dtype), 2.0)
        assert y.shape == shape and y.dtype == dtype


# One number per example


@pytest.mark.parametrize(
    "energy",
    [
        lambda x: spring(x)[:, None],
        lambda x: spring(x).sum(),
        lambda x: spring(x)[:-1],
        lambda x: torch.cat([spring(x), spring(x)]),
        lambda x: 1.0,
        lambda x: spring(x).tolist(),
        lambda x: None,
        lambda x: x,
    ],
)
def test_anything_but_one_number_per_example_is_refused(energy: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(4, 2)
    for use in (evaluate_energy, energy_and_grad, score):
        with pytest.raises(EnergyShapeError) as caught:
            use(energy, x)
        assert "\n" not in str(caught.value) and "(4,)" in str(caught.value)


def test_a_tensor_without_axes_is_no_batch() -> None:
    with pytest.raises(EnergyShapeError, match="a batch"):
        evaluate_energy(lambda x: x, torch.tensor(1.0))


def test_evaluate_energy_lets_gradients_through() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    evaluate_energy(spring, x).sum().backward()
    assert torch.equal(x.grad, x.detach())


# The networks


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cnn_takes_images_of_any_shape(shape: tuple[int, int, int], make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net = EnergyCNN(shape, width=4, hidden=8, generator=g)
    x = 2 * torch.rand(3, *shape, generator=g) - 1
    e, grad = energy_and_grad(net, x)
    assert e.shape == (3,) and grad.shape == x.shape
    assert torch.isfinite(e).all() and torch.isfinite(grad).all()
    assert (grad != 0).float().mean() > 0.99  # every pixel is seen
    convolutions = [layer for layer in net.net if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size[0] for layer in convolutions] == [5] + [3] * (len(convolutions) - 1)
    assert all(layer.stride == (2, 2) for layer in convolutions)
    assert [layer.out_channels for layer in convolutions][:3] == [4, 8, 16][: len(convolutions)]
    last = net.net[: 2 * len(convolutions)](x)
    assert max(last.shape[2:]) == 2
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def test_parameter_counts_by_hand(make_generator: MakeGenerator) -> None:
    assert count_parameters(EnergyMLP()) == (2 * 128 + 128) + 2 * (128 * 128 + 128) + 129
    convolutions = 32 * (25 + 1) + 64 * (32 * 9 + 1) + 128 * (64 * 9 + 1) + 128 * (128 * 9 + 1)
    cnn = EnergyCNN()
    assert count_parameters(cnn) == convolutions + 128 * (512 + 1) + 129
    cnn.net[0].requires_grad_(False)
    assert count_parameters(cnn) == convolutions + 128 * (512 + 1) + 129 - 832
    with frozen(cnn):
        assert count_parameters(cnn) == 0


@pytest.mark.parametrize("n", [0, 1, 5])
def test_batches_of_any_size(kind: str, n: int, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    e, grad = energy_and_grad(make(kind, g), x := batch(kind, n, g))
    assert e.shape == (n,) and grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_of_the_weights_is_the_dtype_of_everything(
    kind: str, dtype: torch.dtype, device: torch.device, make_generator: MakeGenerator
) -> None:
    g = make_generator(0)
    net, x = make(kind, g), batch(kind, 4, g)
    exact_e, exact_grad = energy_and_grad(copy.deepcopy(net).double(), x.double())
    e, grad = energy_and_grad(net.to(device, dtype), x.to(device, dtype))
    assert e.dtype == grad.dtype == dtype and e.device.type == grad.device.type == device.type
    single = 1e-5 if device.type == "cpu" else 2e-3  # on CUDA, convolutions may use TF32: 10 bits of mantissa
    tolerance = {torch.float64: 1e-10, torch.float32: single, torch.bfloat16: 5e-2}[dtype]
    for approximate, exact in ((e, exact_e), (grad, exact_grad)):
        assert (approximate.double().cpu() - exact).norm() < tolerance * exact.norm()
    assert score(net, x.to(device, dtype), 2.0).dtype == dtype


def test_autocast_may_mix_dtypes(kind: str, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net, x = make(kind, g), batch(kind, 3, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        e, grad = energy_and_grad(net, x)
    assert e.shape == (3,) and grad.dtype == torch.float32
    assert torch.allclose(e.float(), net(x), atol=0.02)


def test_memory_format_does_not_change_the_energy(make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net, x = EnergyCNN((3, 16, 16), 8, 16, generator=g), torch.rand(4, 3, 16, 16, generator=g)
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    e, grad = energy_and_grad(other, x.to(memory_format=torch.channels_last))
    assert torch.allclose(e, net(x), atol=1e-6) and torch.allclose(grad, energy_and_grad(net, x)[1], atol=1e-6)


def test_compiles_as_one_graph(kind: str, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net, x = make(kind, g), batch(kind, 4, g)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), net(x))


def test_an_energy_belongs_to_one_example(kind: str, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net = make(kind, g).double()
    x, company = batch(kind, 3, g, torch.float64), 5 * batch(kind, 9, g, torch.float64)
    alone = torch.cat([net(one[None]) for one in x])
    assert torch.allclose(net(torch.cat([x, company]))[:3], alone, rtol=0, atol=1e-14)
    leaf = x.clone().requires_grad_(True)
    (cross,) = torch.autograd.grad(net(leaf)[1], leaf)
    assert (cross[0] == 0).all() and (cross[2] == 0).all() and (cross[1] != 0).any()


def test_the_confining_term(make_generator: MakeGenerator) -> None:
    x = torch.randn(10, 3, generator=make_generator(1))
    directions = nn.functional.normalize(torch.randn(100, 3, generator=make_generator(2)), dim=1)
    falling = 0
    for seed in range(8):
        free = EnergyMLP(3, 16, 2, confine=None, generator=make_generator(seed))
        held = EnergyMLP(3, 16, 2, confine=0.5, generator=make_generator(seed))
        assert torch.allclose(held(x) - free(x), x.square().sum(1) / (2 * 0.25), atol=1e-5)
        falling += bool((free(1000 * directions) < free(100 * directions)).any())
        assert (held(1000 * directions) > held(100 * directions)).all()
    assert falling > 0  # alone, some networks fall without end


def test_weights_follow_from_the_generator_alone(kind: str, make_generator: MakeGenerator) -> None:
    before = torch.get_rng_state()
    first, second, other = (make(kind, make_generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)
    make(kind)  # without a generator, the global one
    assert not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)


def test_initial_weights_have_pytorchs_default_law(make_generator: MakeGenerator) -> None:
    net = EnergyCNN((1, 28, 28), generator=make_generator(0))
    for layer in (layer for layer in net.net if isinstance(layer, nn.Conv2d | nn.Linear)):
        bound = layer.weight[0].numel() ** -0.5
        assert layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound
        if (n := layer.weight.numel()) > 500:  # uniform: mean 0 ± b/√(3n), mean square b²/3 ± b²·√(4/45)/√n; 6 sigma
            assert layer.weight.mean().abs() < 6 * bound / math.sqrt(3 * n)
            assert abs(layer.weight.square().mean() - bound**2 / 3) < 6 * bound**2 * math.sqrt(4 / 45 / n)


def test_copies_and_state_dicts(kind: str, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net, x = make(kind, g), batch(kind, 4, g)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert not torch.equal(twin(x), net(x))
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x))
    assert all(name.startswith("net.") for name in net.state_dict())
    with pytest.raises(RuntimeError):
        EnergyCNN((1, 9, 9)).load_state_dict(net.state_dict())


# Bad input


@pytest.mark.parametrize(
    "arguments",
    [
        {"shape": (1, 7, 28)},
        {"shape": (1, 28, 7)},
        {"shape": (0, 28, 28)},
        {"shape": (28, 28)},
        {"shape": (1, 1, 28, 28)},
        {"width": 0},
        {"hidden": 0},
    ],
)
def test_cnn_refuses_sizes(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        EnergyCNN(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [{"dim": 0}, {"width": 0}, {"depth": 0}, *({"confine": bad} for bad in (0.0, -1.0, math.inf, math.nan))],
)
def test_mlp_refuses_sizes(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        EnergyMLP(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (EnergyCNN((1, 8, 8), 4, 8), torch.zeros(1, 8, 8)),
        (EnergyCNN((1, 8, 8), 4, 8), torch.zeros(5, 1, 8, 9)),
        (EnergyCNN((1, 8, 8), 4, 8), torch.zeros(5, 3, 8, 8)),
        (EnergyCNN((1, 8, 8), 4, 8), torch.zeros(5, 1, 8, 8, dtype=torch.uint8)),
        (EnergyCNN((1, 8, 8), 4, 8), torch.zeros(5, 1, 8, 8, dtype=torch.float64)),
        (EnergyCNN((1, 8, 8), 4, 8), torch.zeros(5, 1, 8, 8).numpy()),
        (EnergyMLP(2, 8), torch.zeros(5, 3)),
        (EnergyMLP(2, 8), torch.zeros(2)),
        (EnergyMLP(2, 8), torch.zeros(5, 4, 2)),
        (EnergyMLP(2, 8), torch.zeros(5, 2, dtype=torch.int64)),
        (EnergyMLP(2, 8), torch.zeros(5, 2, dtype=torch.float64)),
        (EnergyMLP(2, 8), [[0.0, 0.0]]),
    ],
)
def test_networks_refuse_inputs(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^x (must|is)") as caught:
        net(x)
    assert "\n" not in str(caught.value)


def test_gradients_need_floats_and_a_path() -> None:
    for bad in (torch.tensor([[1, 2]]), torch.tensor([[True]]), [[1.0]], None):
        with pytest.raises(ValueError, match="floating-point"):
            energy_and_grad(spring, bad)

    def graphless(x: Tensor) -> Tensor:
        with torch.no_grad():
            return spring(x)

    net = EnergyMLP(width=8)
    cut_off = [graphless, lambda x: spring(x.detach()), lambda x: torch.zeros(len(x)), lambda x: net(x.detach())]
    for energy in cut_off:
        with pytest.raises(ValueError, match="cut off from x") as caught:
            energy_and_grad(energy, torch.ones(3, 2))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_score_refuses_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        score(spring, torch.ones(1, 1), temperature)


# The gradient


def test_energy_and_grad_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    e, grad = energy_and_grad(spring, x)
    assert e.tolist() == [2.5, 12.5] and torch.equal(grad, x)
    assert score(spring, torch.tensor([[6.0]]), 2.0).item() == -3.0
    assert torch.equal(score(lambda x: spring(x) + 100, x), -x)  # a constant does not matter


def test_each_gradient_is_its_own_whatever_the_company(make_generator: MakeGenerator) -> None:
    x = torch.randn(64, 3, dtype=torch.float64, generator=make_generator(0))
    assert torch.equal(energy_and_grad(spring, x)[1][:5], energy_and_grad(spring, x[:5])[1])  # a sum, not a mean


def test_input_gradients_leave_no_trace(kind: str, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net, x = make(kind, g), batch(kind, 4, g)
    kept_x, kept_state = x.clone(), copy.deepcopy(net.state_dict())
    e, grad = energy_and_grad(net, x)
    s = score(net, x)
    assert not (e.requires_grad or grad.requires_grad or s.requires_grad)
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(x, kept_x) and not x.requires_grad and x.grad is None
    assert all(torch.equal(value, kept_state[name]) for name, value in net.state_dict().items())


def test_training_gradients_survive_sampling(kind: str, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net, x = make(kind, g), batch(kind, 4, g)
    net(x).mean().backward()
    kept = [p.grad.clone() for p in net.parameters()]
    assert x.grad is None
    energy_and_grad(net, x)
    score(net, x)
    assert all(torch.equal(p.grad, before) for p, before in zip(net.parameters(), kept, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(mode: Callable, kind: str, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net, x = make(kind, g), batch(kind, 4, g)
    expected = energy_and_grad(net, x)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        e, grad = energy_and_grad(net, x + 0)  # born inside: an inference tensor in one case
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert torch.equal(e, expected[0]) and torch.equal(grad, expected[1])


def test_a_leaf_or_a_result_of_a_graph_is_taken_as_a_plain_value() -> None:
    leaf = torch.ones(2, 2, requires_grad=True)
    for x in (leaf, leaf * 2):
        _, grad = energy_and_grad(spring, x)
        assert torch.equal(grad, x.detach()) and grad.grad_fn is None
    assert leaf.grad is None and leaf.requires_grad


def test_gradcheck_and_gradgradcheck(kind: str, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net = make(kind, g).double().requires_grad_(False)
    x = batch(kind, 2, g, torch.float64).requires_grad_(True)
    assert gradcheck(net, x)
    assert gradgradcheck(net, x)


def test_finite_differences(kind: str, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net, x = make(kind, g).double(), batch(kind, 8, g, torch.float64)
    direction, h = torch.randn(x.shape, generator=g, dtype=torch.float64), 1e-5
    with torch.no_grad():
        numeric = (net(x + h * direction) - net(x - h * direction)) / (2 * h)
    exact = (energy_and_grad(net, x)[1] * direction).flatten(1).sum(1)
    assert (numeric - exact).norm() < 1e-8 * exact.norm()


def test_the_slope_is_smooth(kind: str, make_generator: MakeGenerator) -> None:
    g = make_generator(0)
    net, x = make(kind, g).double(), batch(kind, 2, g, torch.float64)

    def largest_change(n: int) -> float:
        t = torch.linspace(0, 1, n, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1))
        return energy_and_grad(net, x[:1] + t * (x[1:] - x[:1]))[1].diff(dim=0).flatten(1).norm(dim=1).max().item()

    assert math.isclose(largest_change(2001) / largest_change(201), 0.1, rel_tol=0.05)


# Frozen


def flags_and_modes(net: nn.Module) -> tuple[list[bool], list[bool]]:
    return [p.requires_grad for p in net.parameters()], [m.training for m in net.modules()]


def mixed() -> nn.Module:
    """A network some of whose parameters train and some of whose modules are in eval mode."""
    net = EnergyCNN((1, 8, 8), 4, 8)
    net.net[0].requires_grad_(False)
    net.net[2].bias.requires_grad_(False)
    net.net[3].eval()
    return net


BUILDERS = [mixed, Restless, lambda: Restless().eval(), lambda: Restless().requires_grad_(False)]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_frozen_puts_everything_back(build: Callable[[], nn.Module], error: type[BaseException] | None) -> None:
    net = build()
    before = flags_and_modes(net)
    try:
        with frozen(net) as inside:
            assert inside is net
            assert not any(any(state) for state in flags_and_modes(net))
            with frozen(net):
                pass
            assert not any(any(state) for state in flags_and_modes(net))
            if error:
                raise error("on the way out")
    except (RuntimeError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    assert flags_and_modes(net) == before


def test_frozen_keeps_gradients_and_buffers(make_generator: MakeGenerator) -> None:
    net, x = Restless(), torch.randn(8, 2, generator=make_generator(0))
    net(x).sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    buffers = [b.clone() for b in net.buffers()]
    with frozen(net):
        first, second = energy_and_grad(net, x), energy_and_grad(net, x)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])  # no dropout
    assert all(torch.equal(p.grad, kept) for p, kept in zip(net.parameters(), grads, strict=True))
    assert all(torch.equal(b, kept) for b, kept in zip(net.buffers(), buffers, strict=True))


def test_even_backward_cannot_reach_frozen_parameters(make_generator: MakeGenerator) -> None:
    net, x = make("points", make_generator(0)), torch.ones(3, 2, requires_grad=True)
    with frozen(net):
        net(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters())


def test_frozen_lets_other_callables_pass() -> None:
    with frozen(spring) as inside:
        assert inside is spring


def test_score_restores_after_an_error_in_the_energy() -> None:
    class Fails(Restless):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("broken energy")

    net = Fails()
    before = flags_and_modes(net)
    with pytest.raises(ArithmeticError, match="broken energy"):
        score(net, torch.ones(2, 2))
    assert flags_and_modes(net) == before and torch.is_grad_enabled()


def test_shared_parameters_and_wrapped_networks(make_generator: MakeGenerator) -> None:
    inner = make("points", make_generator(0))
    average = torch.optim.swa_utils.AveragedModel(inner)
    x = torch.ones(2, 2)
    assert torch.equal(score(average, x), score(inner, x))
    assert all(p.requires_grad for p in average.parameters()) and average.training
    tied = nn.ModuleList([inner, inner])
    assert count_parameters(tied) == count_parameters(inner)


def test_grad_mode_of_other_threads_is_their_own() -> None:
    seen: list[bool] = []
    with torch.no_grad():
        thread = threading.Thread(target=lambda: seen.append(energy_and_grad(spring, torch.ones(1, 1))[1].item() == 1))
        thread.start()
        thread.join()
        assert not torch.is_grad_enabled()
    assert seen == [True]
