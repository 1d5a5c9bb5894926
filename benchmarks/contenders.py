"""Who is compared in langevin_speed.py: this library, the loop of a textbook, torchebm and ebmkit.

Each function builds one contender from a network of its own. The sources of the versions in `PEERS` were read to give
every library the same law of the noise and its fastest documented way.
"""

import copy
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

from ebm_lit import EnergyCNN, EnergyMLP, Langevin, TrainConfig, toy, uniform_init
from ebm_lit.boltzmann import double_well
from ebm_lit.fast import accelerate
from ebm_lit.training import init_state, learning_rate, train_step

OURS, COMPILED, TEXTBOOK = "ebm_lit", "ebm_lit, compiled", "textbook"
PEERS = {"torchebm": "0.8.9", "ebmkit": "0.16"}  # distribution -> the version that was read


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "double_well": double_well,
    "mixture": toy("mixture").energy,
    "rings": toy("rings").energy,
}


class Formula(nn.Module):
    """An energy that is no network of ours: nothing is known about it, and autograd has to do."""

    def __init__(self, energy: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x)


@dataclass(frozen=True)
class ChainCase:
    """Chains of one length on one network."""

    title: str
    kind: str  # "cnn", "mlp" or a name of `FORMULAS`
    batch: int  # chains
    n_steps: int
    step_size: float  # η
    noise_scale: float  # σ
    bounds: tuple[float, float] | None  # the clamp after every step
    spread: float  # chains start uniformly in ±spread
    repeats: int = 10
    freed: int = 0  # bytes of a block that the process has freed before

    def network(self, device: torch.device) -> nn.Module:
        """The book's network with its last layer scaled, so that drift and noise of a step are alike, or a formula."""
        if self.kind in FORMULAS:
            return Formula(FORMULAS[self.kind])
        g = torch.Generator().manual_seed(0)
        net = EnergyCNN((1, 28, 28), generator=g) if self.kind == "cnn" else EnergyMLP(generator=g)
        with torch.no_grad():
            net.net[-1].weight.mul_(30.0 if self.kind == "cnn" else 10.0)
        return net.to(device)

    def starts(self, seed: int, device: torch.device) -> Tensor:
        g = torch.Generator(device).manual_seed(1000 + seed)
        shape = (1, 28, 28) if self.kind == "cnn" else (2,)
        return uniform_init(self.batch, shape, (-self.spread, self.spread), g)


# Contenders: a chain takes starts (B, *shape) and returns the last states

Chain = Callable[[Tensor], Tensor]


def chain_ours(net: nn.Module, case: ChainCase, device: torch.device) -> Chain:
    """As it comes; on a GPU as in training, where whoever keeps the accelerated network keeps the recorded chain."""
    sampler = Langevin(case.step_size, case.n_steps, noise_scale=case.noise_scale, bounds=case.bounds)
    g, walk_on = torch.Generator(device).manual_seed(1), net
    if device.type == "cuda":
        walk_on = accelerate(net, case.starts(0, device))[0]
    return lambda x0: sampler.sample(walk_on, x0, generator=g)


class NotCompiled(RuntimeError):
    """`torch.compile` gave up, and the chain was made without it."""


def chain_compiled(net: nn.Module, case: ChainCase, device: torch.device) -> Chain:
    """Ours with several steps as one function through `torch.compile`; the first call compiles."""
    sampler = Langevin(
        case.step_size, case.n_steps, noise_scale=case.noise_scale, bounds=case.bounds, accelerate="compile"
    )
    torch._dynamo.reset()  # so that no case finds the limit of compilations used up by another
    inductor.force_disable_caches = True  # the first call compiles, whatever an earlier run has left on the disk
    g, walk_on = torch.Generator(device).manual_seed(1), accelerate(net, case.starts(0, device), "compile")[0]

    def chain(x0: Tensor) -> Tensor:
        found = sampler.run(walk_on, x0, generator=g)
        if not found.engine.startswith("compiled"):
            raise NotCompiled(found.engine)
        return found.x

    return chain


def textbook_chain(
    net: nn.Module, x: Tensor, n_steps: int, eta: float, sigma: float, bounds: tuple[float, float] | None
) -> Tensor:
    """The loop as one writes it from the formula; the parameters are left trainable."""
    for _ in range(n_steps):
        x = x.detach().requires_grad_(True)
        grad = torch.autograd.grad(net(x).sum(), x)[0]
        x = x - eta * grad + sigma * torch.randn_like(x)
        if bounds is not None:
            x = x.clamp(*bounds)
    return x.detach()


def chain_textbook(net: nn.Module, case: ChainCase, device: torch.device) -> Chain:
    return lambda x0: textbook_chain(net, x0, case.n_steps, case.step_size, case.noise_scale, case.bounds)


def torchebm_model(net: nn.Module) -> Any:
    """The network as torchebm wants it; its own `gradient` asks for the input's gradient only."""
    from torchebm.core import BaseModel

    class Wrapped(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    return Wrapped().to(next(net.parameters()).device)


def chain_torchebm(net: nn.Module, case: ChainCase, device: torch.device) -> Chain:
    """Its noise has the standard deviation noise_scale·√(2η)."""
    from torchebm.samplers import LangevinDynamics

    scale = case.noise_scale / math.sqrt(2 * case.step_size)
    sampler = LangevinDynamics(
        torchebm_model(net), step_size=case.step_size, noise_scale=scale, clamp=case.bounds, device=device
    )
    return lambda x0: sampler.sample(x=x0.clone(), n_steps=case.n_steps)


def chain_ebmkit(net: nn.Module, case: ChainCase, device: torch.device) -> Chain:
    """Its `noise_scale` is σ itself; it freezes the parameters by itself."""
    from ebm import LangevinDynamics

    sampler = LangevinDynamics(
        step_size=case.step_size, noise_scale=case.noise_scale, grad_clip=None, clamp=case.bounds
    )
    return lambda x0: sampler.sample(net, x0, steps=case.n_steps)


CHAINS: dict[str, Callable[[nn.Module, ChainCase, torch.device], Chain]] = {
    OURS: chain_ours,
    COMPILED: chain_compiled,
    TEXTBOOK: chain_textbook,
    "torchebm": chain_torchebm,
    "ebmkit": chain_ebmkit,
}


# Contenders: training


@dataclass
class Training:
    """A run: `advance(n)` makes n updates, `negatives()` are those of the last one."""

    net: nn.Module
    advance: Callable[[int], None]
    negatives: Callable[[], Tensor]


def train_ours(net: nn.Module, cfg: TrainConfig, x_data: Tensor) -> Training:
    state = init_state(cfg, x_data, net)

    def advance(n: int) -> None:
        for _ in range(n):
            train_step(state, x_data)

    return Training(net, advance, lambda: state.buffer.samples[state.buffer.ages > 0])


def _optimizer(net: nn.Module, cfg: TrainConfig) -> tuple[torch.optim.Optimizer, Any]:
    """Adam and the learning-rate schedule, the same for everybody."""
    adam = torch.optim.Adam(net.parameters(), lr=cfg.learning_rate, betas=(cfg.beta1, 0.999))
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda i: learning_rate(cfg, i) / cfg.learning_rate)


def _noisy_batch(x_data: Tensor, cfg: TrainConfig) -> Tensor:
    x = x_data[torch.randint(len(x_data), (cfg.batch_size,), device=x_data.device)]
    return (x + cfg.data_noise * torch.randn_like(x)).clamp(-1, 1)


def train_textbook(net: nn.Module, cfg: TrainConfig, x_data: Tensor) -> Training:
    """Persistent contrastive divergence as one writes it: two forwards, clip, Adam, a loop for the average."""
    optimizer, schedule = _optimizer(net, cfg)
    average = copy.deepcopy(net)
    buffer = torch.rand(cfg.buffer_size, *x_data.shape[1:], device=x_data.device) * 2 - 1
    last: dict[str, Tensor] = {}

    def update() -> None:
        x_pos = _noisy_batch(x_data, cfg)
        slots = torch.randint(cfg.buffer_size, (cfg.batch_size,), device=x_data.device)
        x = buffer[slots]
        fresh = torch.rand(cfg.batch_size, device=x.device) < cfg.reinit_prob
        x[fresh] = torch.rand_like(x[fresh]) * 2 - 1
        x_neg = textbook_chain(net, x, cfg.n_steps, cfg.step_size, cfg.noise_scale, cfg.bounds)
        buffer[slots] = x_neg
        e_pos, e_neg = net(x_pos), net(x_neg)
        loss = e_pos.mean() - e_neg.mean() + cfg.alpha * (e_pos.square().mean() + e_neg.square().mean())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), cfg.weight_grad_clip)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for mean, p in zip(average.parameters(), net.parameters(), strict=True):
                mean.lerp_(p, 1 - cfg.ema_decay)
        last["x"] = x_neg

    def advance(n: int) -> None:
        for _ in range(n):
            update()

    return Training(net, advance, lambda: last["x"])


def train_torchebm(net: nn.Module, cfg: TrainConfig, x_data: Tensor) -> Training:
    """The loop of its documentation around its persistent loss with replay buffer, and its fused average.

    Its buffer perturbs a share of the chains where the others restart them, which costs as much.
    """
    from torchebm.losses import ContrastiveDivergence
    from torchebm.samplers import LangevinDynamics
    from torchebm.utils.ema import EMA

    model, device = torchebm_model(net), x_data.device
    scale = cfg.noise_scale / math.sqrt(2 * cfg.step_size)
    sampler = LangevinDynamics(model, step_size=cfg.step_size, noise_scale=scale, clamp=cfg.bounds, device=device)
    loss_fn = ContrastiveDivergence(
        model,
        sampler,
        k_steps=cfg.n_steps,
        persistent=True,
        buffer_size=cfg.buffer_size,
        init_steps=0,
        new_sample_ratio=cfg.reinit_prob,
        energy_reg_weight=cfg.alpha,
        add_noise_to_real=True,
        noise_scale=cfg.data_noise,
        device=device,
    )
    loss_fn.initialize_buffer(tuple(x_data.shape[1:]))
    loss_fn.replay_buffer.uniform_(-1, 1)  # chains start where everybody's do
    optimizer, schedule = _optimizer(net, cfg)
    ema = EMA(model, decay=cfg.ema_decay)
    last: dict[str, Tensor] = {}

    def advance(n: int) -> None:
        for _ in range(n):
            x = x_data[torch.randint(len(x_data), (cfg.batch_size,), device=device)]
            optimizer.zero_grad()
            loss, last["x"] = loss_fn(x)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), cfg.weight_grad_clip)
            optimizer.step()
            schedule.step()
            ema.update(model)

    return Training(net, advance, lambda: last["x"])


def train_ebmkit(net: nn.Module, cfg: TrainConfig, x_data: Tensor) -> Training:
    """Its own `Trainer` with its persistent loss and replay buffer."""
    import ebm

    def init(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape) * 2 - 1

    sampler = ebm.LangevinDynamics(
        step_size=cfg.step_size, steps=cfg.n_steps, noise_scale=cfg.noise_scale, grad_clip=None, clamp=cfg.bounds
    )
    buffer = ebm.ReplayBuffer(cfg.buffer_size, tuple(x_data.shape[1:]), cfg.reinit_prob, init)
    loss_fn = ebm.ContrastiveDivergence(sampler, buffer, energy_reg=cfg.alpha, init_fn=init)
    optimizer, schedule = _optimizer(net, cfg)
    last: dict[str, Tensor] = {}

    def after_step(_: int, out: Any) -> None:
        schedule.step()
        last["x"] = out.x_neg

    trainer = ebm.Trainer(
        net,
        loss_fn,
        optimizer,
        device=x_data.device,
        ema_decay=cfg.ema_decay,
        grad_clip_norm=cfg.weight_grad_clip,
        callback=after_step,
    )

    def batches() -> Iterator[Tensor]:
        while True:
            yield _noisy_batch(x_data, cfg)

    stream = batches()
    return Training(net, lambda n: trainer.fit(stream, steps=n, verbose=False) and None, lambda: last["x"])


TRAININGS: dict[str, Callable[[nn.Module, TrainConfig, Tensor], Training]] = {
    OURS: train_ours,
    TEXTBOOK: train_textbook,
    "torchebm": train_torchebm,
    "ebmkit": train_ebmkit,
}


def contenders() -> tuple[list[str], dict[str, str]]:
    """Who takes part, and why the others do not."""
    present, skipped = [OURS, TEXTBOOK], {}
    for name, wanted in PEERS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            skipped[name] = "not installed (pip install -e '.[bench]')"
            continue
        if version == wanted or version.startswith(f"{wanted}."):
            present.append(name)
        else:
            skipped[name] = f"version {version} is installed, {wanted} was compared"
    return present, skipped
