"""Two ways to the density itself on MNIST: Metropolis' test on the shipped chains, reweighted chains in training.

    python benchmarks/mnist_density.py metropolis --threads 1     ten minutes, tables on standard output
    python benchmarks/mnist_density.py reweighted --threads 1     eight minutes
    python benchmarks/mnist_density.py all --store                and write benchmarks/results/mnist_density.json
    python benchmarks/mnist_density.py all --small                a few seconds, to see that it runs

Metropolis: MALA keeps its law exactly for steps of any size, so what still drifts under it is not the size of the
steps. It is run within the box of the pixels, without a box, and with a spring outside of the box in its stead. With a
spring of stiffness λ the law is that of E(clamp x) + λ/2·‖x − clamp x‖²: another density for each λ.

Reweighted: walkers from a standard normal, of known log Z, follow an energy that learns. Each carries the weight of
Jarzynski's equality, which makes up for what a walker lags behind: exactly if the energies are chosen without looking
at the walkers, and as their number grows where training looks at them. No clamp and no restarts: the weights know of
neither.
Source: Carbone, Hua, Coste & Vanden-Eijnden 2023, "Efficient training of energy-based models using Jarzynski equality".
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mnist_quality import data, facts, strip
from shipping import about
from torch import Tensor

from ebm_lit.energy import Energy, EnergyCNN, energy_and_grad
from ebm_lit.evaluation import weight_summary
from ebm_lit.langevin import MALA, Langevin
from ebm_lit.pretrained import load_pretrained, model_card
from ebm_lit.training import denoise, generate, write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "mnist_density.json"
SPRINGS = (0.03, 0.1)  # λ, energy for a squared unit outside of the box
ETAS = (6.0, 0.6, 0.06, 0.006, 0.0006)
KEPT = ("n", "frechet", "over_floor", "confident", "smallest_class", "largest_class")


def judged(x: Tensor, real: Tensor) -> dict[str, Any]:
    """The judge's words about images."""
    found = facts(x, real)
    return {k: found[k] for k in KEPT}


def say(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row, and hand it on."""
    print(json.dumps(row, ensure_ascii=False), flush=True)
    return row


def metropolis(real: Tensor, n: int = 500, steps: int = 1200, parts: int = 2) -> dict[str, Any]:
    """Acceptance by step size and box, where chains without a box go, and how far those with a spring drift."""
    state, g = load_pretrained("mnist"), torch.Generator().manual_seed(5)
    network, chain, temperature = state.ema.module, state.config.sampler, state.config.sampler.implied_temperature

    def mala(energy: Energy, x: Tensor, eta: float, count: int, bounds: Any = None) -> tuple[Tensor, float]:
        done = MALA(eta, count, temperature=temperature, bounds=bounds).run(energy, x, generator=g)
        return done.x, round(float(done.acceptance_rate.mean()), 3)

    def seen(x: Tensor) -> dict[str, Any]:
        """Without the noise that steps of different sizes leave in different measure."""
        return judged(denoise(network, x.clamp(-1, 1), state.config.data_noise, temperature, (-1.0, 1.0)), real)

    x = generate(state, n, generator=g, finished=False).x
    few, pictures = x[: max(1, n // 5)], [x[:8]]
    walls = round(float((x.abs() >= 1).float().mean()), 4)
    found: dict[str, Any] = {"temperature": temperature, "on_the_walls": walls, "acceptance": []}
    for name, bounds in (("within the box", (-1.0, 1.0)), ("without a box", None)):
        for eta in ETAS:
            row = {"where": name, "eta": eta, "taken": mala(network, few, eta, 40, bounds)[1]}
            found["acceptance"].append(say(row))
    away, taken = mala(network, few, 0.6, steps)
    out = {"eta": 0.6, "steps": steps, "taken": taken, "outside": round(float((away.abs() > 1).float().mean()), 3)}
    found["without a box"] = say(out | {"largest": round(float(away.abs().max()), 1)})

    eta, far = state.config.step_size / 4, 0.0
    found["drift"] = []
    for spring in SPRINGS:

        def with_spring(x: Tensor, spring: float = spring) -> Tensor:
            c = x.clamp(-1, 1)
            return network(c) + spring / 2 * (x - c).square().flatten(1).sum(1)

        # Unadjusted steps first, into what the spring allows: on the walls themselves hardly a proposal is taken.
        own = Langevin(1.0, 300, temperature=temperature).sample(with_spring, x, generator=g)
        name, went = f"Metropolis, λ = {spring:g}", 0.0
        found["drift"].append(say({"chain": name, "steps": 0, "way": 0, **seen(own)}))
        for part in range(1, parts + 1):
            own, taken = mala(with_spring, own, eta, steps)
            went += steps * eta * taken
            row = {"chain": name, "eta": eta, "steps": part * steps, "taken": taken, "way": round(went)}
            found["drift"].append(say(row | seen(own)))
        pictures.append(own[:8].clamp(-1, 1))
        far = max(far, went)
    walker, made = x, 0
    found["drift"].append(say({"chain": "the recipe's", "steps": 0, "way": 0, **seen(walker)}))
    for part in range(1, parts + 1):
        more = round(part * far / parts / chain.step_size) - made
        walker = chain.sample(network, walker, more, g, ages=state.config.sample_steps)
        made += more
        row = {"chain": "the recipe's", "eta": chain.step_size, "steps": made, "way": round(made * chain.step_size)}
        found["drift"].append(say(row | seen(walker)))
    found["picture"] = strip(torch.cat([*pictures, walker[:8]]))
    return found


class Walkers(NamedTuple):
    """Reweighted chains: Σ softmax(log_w)ᵢ f(xᵢ) tends to the mean of f under exp(−E)/Z as n grows."""

    x: Tensor  # (n, *shape)
    energy: Tensor  # (n,), by the energy that they walk under next
    grad: Tensor  # (n, *shape)
    log_w: Tensor  # (n,)


def jarzynski_step(
    walkers: Walkers,
    energy: Energy,  # the one that comes next; T = 1
    step_size: float,  # h: x − h∇E + √(2h) ω
    noise: Tensor,  # ω (n, *shape), standard normal
) -> Walkers:
    """A step under the energy that was, weighed for the energy that comes: for steps of any size, unadjusted.

    The weight is the ratio of what the way back under the new energy and the way there under the old one would cost.
    Mean weights are those of Z as long as the energies do not depend on these walkers.
    """
    x, e, grad, log_w = walkers
    new = x - step_size * grad + math.sqrt(2 * step_size) * noise
    e_new, grad_new = energy_and_grad(energy, new)
    there = (new - x + step_size * grad).square().flatten(1).sum(1)
    back = (x - new + step_size * grad_new).square().flatten(1).sum(1)
    return Walkers(new, e_new, grad_new, log_w + e - e_new + (there - back) / (4 * step_size))


def resample(walkers: Walkers, u: Tensor) -> tuple[Walkers, Tensor]:
    """Systematic resampling with one u of [0, 1): walkers of equal weight, and the numbers (n,) of their parents."""
    n = len(walkers.x)
    places = (torch.arange(n, dtype=torch.float64) + u) / n
    index = torch.searchsorted(walkers.log_w.double().softmax(0).cumsum(0), places).clamp(max=n - 1)
    x, e, grad, log_w = walkers
    return Walkers(x[index], e[index], grad[index], torch.zeros_like(log_w)), index


class Population:
    """Walkers with the log Z that their weights say, resampled where they are worth less than half of their number."""

    def __init__(self, x: Tensor, energy: Energy, log_z: float, step_size: float, generator: torch.Generator) -> None:
        """Draws x (n, *shape) of exp(−energy)/Z, with the log Z of that energy."""
        self.walkers = Walkers(x, *energy_and_grad(energy, x), x.new_zeros(len(x)))
        self.step_size, self.generator, self.past = step_size, generator, log_z
        self.ancestors, self.resampled, self.worst = torch.arange(len(x)), 0, float(len(x))

    @property
    def log_z(self) -> float:
        """Of the present energy."""
        return self.past + float(weight_summary(self.walkers.log_w).log_mean)

    def draw(self, n: int) -> Tensor:
        """Walkers, as often as their weights say."""
        weights = self.walkers.log_w.softmax(0)
        return self.walkers.x[torch.multinomial(weights, n, replacement=True, generator=self.generator)]

    def follow(self, energy: Energy) -> None:
        """One step, towards this energy."""
        x, g = self.walkers.x, self.generator
        noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
        self.walkers = jarzynski_step(self.walkers, energy, self.step_size, noise)
        ess = float(weight_summary(self.walkers.log_w).ess)
        self.worst = min(self.worst, ess)
        if ess < len(x) / 2:
            self.past, self.resampled = self.log_z, self.resampled + 1
            self.walkers, parents = resample(self.walkers, torch.rand((), generator=g, dtype=torch.float64))
            self.ancestors = self.ancestors[parents]


def reweighted(
    seen: Tensor, real: Tensor, rate: float, iterations: int, n: int = 512, batch: int = 256, h: float = 0.01
) -> dict[str, Any]:
    """Train with reweighted walkers; what became of their weights, and what they look like."""
    g = torch.Generator().manual_seed(0)
    network = EnergyCNN((1, 28, 28), width=16, hidden=64, generator=g)
    last = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
    torch.nn.init.zeros_(last.weight)  # at first the energy is that of the normal alone
    torch.nn.init.zeros_(last.bias)

    def energy(x: Tensor) -> Tensor:
        return network(x) + x.square().flatten(1).sum(1) / 2

    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    x = torch.randn(n, 1, 28, 28, generator=g)
    population = Population(x, energy, x[0].numel() / 2 * math.log(2 * math.pi), h, g)
    rows, began = [], time.perf_counter()
    for k in range(iterations):
        clean = seen[torch.randint(len(seen), (batch,), generator=g)]
        noisy = clean + 0.2 * torch.randn(clean.shape, generator=g)
        e_pos, e_neg = energy(torch.cat([noisy, population.draw(batch)])).view(2, -1).mean(1)
        optimizer.zero_grad()
        (e_pos - e_neg).backward()
        decay = 0.5 * (1 + math.cos(math.pi * k / iterations))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (k + 1) / 100) * decay
        optimizer.step()
        population.follow(energy)
        if (k + 1) % max(1, iterations // 10) == 0:
            row: dict[str, Any] = {"iteration": k + 1, "seconds": round(time.perf_counter() - began)}
            row |= {"resampled": population.resampled, "ancestors": len(population.ancestors.unique())}
            row |= {"worst_effective": round(population.worst, 1), "log_z": round(population.log_z, 1)}
            rows.append(say(row | {"gap": round(float((e_pos - e_neg).detach()), 2)}))
            population.worst = float(n)
    drawn = population.draw(n).clamp(-1, 1)
    settings = {"rate": rate, "iterations": iterations, "walkers": n, "batch": batch, "h": h, "data_noise": 0.2}
    return {**settings, "rows": rows, "judged": say(judged(drawn, real)), "picture": strip(drawn[:16])}


RUNS = {2e-5: 1600, 1e-4: 2000}  # rate: iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("metropolis", "reweighted", "all"), help="which of the two ways")
    parser.add_argument("--small", action="store_true", help="a few steps only, to see that it runs")
    parser.add_argument("--store", action="store_true", help=f"write benchmarks/results/{RESULTS.name}")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.small and args.store:
        parser.error("--small is never stored")
    seen, real = data()
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found = {**old, **about("mnist", seen)}
    if args.what in ("metropolis", "all"):
        run = metropolis(real, *((20, 4, 1) if args.small else ()))
        found["metropolis"] = {"weights": model_card("mnist")["sha256"], **run}
    if args.what in ("reweighted", "all"):
        runs = [(rate, 20 if args.small else count) for rate, count in RUNS.items()]
        found["reweighted"] = [reweighted(seen, real, *run, *((64, 32) if args.small else ())) for run in runs]
    if args.store:
        write_atomically(RESULTS, json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main()
