"""Contrastive divergence against exact maximum likelihood on the plane, where both can be judged exactly.

    python benchmarks/two_d_truth.py                              four toys, three seeds, table on standard output
    python benchmarks/two_d_truth.py --store                      and write benchmarks/results/two_d_truth.json
    python benchmarks/two_d_truth.py --toys moons --seeds 1 2     only these; with --store their rows are replaced
    python benchmarks/two_d_truth.py --without-restarts           chains that only walk, for comparison

Both models of a row are the same network from the same start, trained by the same optimiser for as many steps on the
same 10,000 points. The oracle's gradient is exact: a grid that is shifted at random in every step. Contrastive
divergence never sees a grid: 1,024 persistent chains make one Metropolis-adjusted Langevin step an iteration, with a
step size that follows their acceptance rate, after twelve offers of a restart from noise, each taken or refused by
Metropolis' rule, which keeps the model's density what it is. Judged are running averages of the weights.
"""

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_lit import EnergyMLP, __version__, cd_loss, toy, uniform_init
from ebm_lit.boltzmann import log_density, make_grid
from ebm_lit.evaluation import mean_log_ratio, plane_kl
from ebm_lit.langevin import MALA

RESULTS = Path(__file__).resolve().parent / "results" / "two_d_truth.json"
TARGETS = {"mixture25": 0.02, "moons": 0.02, "rings": 0.05, "checkerboard": 0.05}  # nats
SETTINGS: dict[str, Any] = {
    "width": 64,
    "depth": 3,
    "confine": 2.0,  # s of the confining term
    "steepness": 6.0,  # of the first layer, against the usual initial weights
    "iterations": 1500,
    "learning_rate": 1e-2,  # of Adam; 30 steps of warm-up, then half a cosine down to zero
    "averaging": 0.01,  # share of the newest weights in their running average
    "n_train": 10_000,
    "n_held_out": 10_000,
    "chains": 1024,
    "batch": 1024,  # data of one step of contrastive divergence
    "langevin_steps": 1,
    "restart_offers": 12,  # per chain and iteration
    "acceptance": 0.65,  # which the step size follows, up to 0.5
    "box": 4.5,  # half the side of the square from which chains start and restart
    "oracle_batch": 1024,
    "oracle_cells": 72,  # per axis, over [-5, 5]
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_energy(seed: int, settings: dict[str, Any]) -> EnergyMLP:
    """A fresh network with a steep first layer, so that its units bend within the data."""
    s = settings
    energy = EnergyMLP(2, s["width"], s["depth"], confine=s["confine"], generator=generator(seed))
    with torch.no_grad():
        for p in energy.net[0].parameters():
            p.mul_(s["steepness"])
    return energy


def fit(
    energy: EnergyMLP, loss_of: Callable[[], Tensor], settings: dict[str, Any]
) -> tuple[EnergyMLP, dict[str, float]]:
    """Minimise a loss; returns the running average of the weights, and seconds by the clock and of the processor."""
    n, rate = settings["iterations"], settings["learning_rate"]
    average, optimizer = copy.deepcopy(energy), torch.optim.Adam(energy.parameters(), lr=rate)
    wall, cpu = time.perf_counter(), time.process_time()
    for i in range(n):
        optimizer.param_groups[0]["lr"] = rate * min((i + 1) / 30, 0.5 * (1 + math.cos(math.pi * i / n)))
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), energy.parameters(), strict=True):
                a.lerp_(p, settings["averaging"])
    return average, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def batch(x: Tensor, n: int, g: torch.Generator) -> Tensor:
    return x[torch.randint(len(x), (n,), generator=g)]


def train_oracle(x: Tensor, seed: int, settings: dict[str, Any]) -> tuple[EnergyMLP, dict[str, float]]:
    """Maximum likelihood with the exact gradient, by quadrature."""
    energy, g, cells = new_energy(seed, settings), generator(seed), settings["oracle_cells"]
    points = make_grid([(-5, 5)] * 2, cells).points.float()

    def nll() -> Tensor:  # up to a constant
        shifted = points + 10 / cells * (torch.rand(2, generator=g) - 0.5)
        return energy(batch(x, settings["oracle_batch"], g)).mean() + torch.logsumexp(-energy(shifted), 0)

    return fit(energy, nll, settings)


@torch.no_grad()
def offer_restarts(energy: EnergyMLP, x: Tensor, offers: int, box: float, g: torch.Generator) -> Tensor:
    """Offer every chain places drawn uniformly from a square, one after another; each is taken by Metropolis' rule.

    A chain outside the square stays: from inside, it could not be proposed either. So the model's law is kept.
    """
    n = len(x)
    fresh = uniform_init(n * offers, (2,), (-box, box), g)
    e, *e_fresh = energy(torch.cat([x, fresh])).split(n)
    e = torch.where((x.abs() < box).all(1), e, -math.inf)
    for place, e_new in zip(fresh.split(n), e_fresh, strict=True):
        taken = torch.rand(n, generator=g).log() < e - e_new
        x, e = torch.where(taken[:, None], place, x), torch.where(taken, e_new, e)
    return x


def train_cd(x: Tensor, seed: int, settings: dict[str, Any]) -> tuple[EnergyMLP, dict[str, float]]:
    """Persistent contrastive divergence: every chain moves on in every iteration."""
    s, energy, g = settings, new_energy(seed, settings), generator(seed)
    chains, eta = uniform_init(s["chains"], (2,), (-s["box"], s["box"]), g), 0.1

    def loss() -> Tensor:
        nonlocal chains, eta
        if s["restart_offers"]:
            chains = offer_restarts(energy, chains, s["restart_offers"], s["box"], g)
        run = MALA(eta, s["langevin_steps"]).run(energy, chains, generator=g)
        chains = run.x
        eta = min(0.5, eta * math.exp(0.2 * (run.acceptance_rate.mean().item() - s["acceptance"])))
        x_pos = batch(x, s["batch"], g)
        return cd_loss(*energy(torch.cat([x_pos, chains])).split([s["batch"], s["chains"]])).loss

    return fit(energy, loss, settings)


def judged(name: str, energy: EnergyMLP, tol: float = 1e-4) -> dict[str, Any]:
    """Both divergences by refined quadrature; `None` stands for infinity, with the reason beside it.

    The cells become small: a good model of the checkerboard falls off within a hundredth of a unit at its borders.
    """
    kl = plane_kl(toy(name).log_prob, energy, radius=8.0, tol=tol, max_cells=4096)
    finite = {k: v if math.isfinite(v) else None for k, v in (("forward", kl.forward), ("reverse", kl.reverse))}
    return {**finite, "log_z": kl.log_z, "error": kl.error, "tail": kl.tail, "cells": kl.cells, "reason": kl.reason}


@torch.no_grad()
def picture(name: str, energy: EnergyMLP, log_z: float, cells: int = 64) -> list[str]:
    """The model's density over [-4, 4]², in percent of the data's largest, a string for each row, from the top down."""
    grid = make_grid([(-4, 4)] * 2, cells)
    percent = 100 * (log_density(energy, grid.points.float(), log_z) - toy(name).log_prob(grid.points).max()).exp()
    rows = percent.reshape(cells, cells).T.flip(0).round().int().tolist()
    return [" ".join(map(str, row)) for row in rows]


def one_row(name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train both models on one toy from one seed and judge them, by integrals and on held-out points."""
    target = toy(name)
    x = target.sample(settings["n_train"], generator(1000 + seed))
    x_held = target.sample(settings["n_held_out"], generator(2000 + seed))
    truth = target.log_prob(x_held.double())
    row: dict[str, Any] = {"toy": name, "seed": seed}
    log_q = {}
    for kind, train in (("oracle", train_oracle), ("cd", train_cd)):
        energy, seconds = train(x, seed, settings)
        row[kind] = {"seconds": seconds, **judged(name, energy)}
        with torch.no_grad():
            log_q[kind] = log_density(energy, x_held, row[kind]["log_z"]).double()
        row[kind]["held_out"] = mean_log_ratio(truth, log_q[kind])._asdict()
        if seed == 0:
            row[kind]["picture"] = picture(name, energy, row[kind]["log_z"])
    gap = mean_log_ratio(log_q["oracle"], log_q["cd"])
    row["gap"] = {"exact": row["cd"]["forward"] - row["oracle"]["forward"], "held_out": gap._asdict()}
    return row


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    gap, held = row["gap"], row["gap"]["held_out"]
    return (
        f"| {row['toy']} | {row['seed']} | {row['oracle']['forward']:.4f} | {row['cd']['forward']:.4f} "
        f"| {gap['exact']:.4f} | {held['mean']:.4f} ± {held['standard_error']:.4f} "
        f"| {row['oracle']['seconds']['cpu']:.0f} | {row['cd']['seconds']['cpu']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toys", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, help="fewer or more than the recipe's")
    parser.add_argument("--without-restarts", action="store_true", help="chains that only walk")
    parser.add_argument("--threads", type=int, default=1, help="points of a plane are too few to share among cores")
    parser.add_argument("--store", action="store_true", help=f"write benchmarks/results/{RESULTS.name}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = SETTINGS | ({"restart_offers": 0, "langevin_steps": 3} if args.without_restarts else {})
    settings |= {"iterations": args.iterations} if args.iterations else {}
    print("| toy | seed | KL oracle | KL CD | gap, exact | gap, held out | oracle CPU s | CD CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.toys:
        for seed in args.seeds:
            row = one_row(name, seed, settings)
            print(line(row), flush=True)
            if args.store:
                store(row, settings, "runs_without_restarts" if args.without_restarts else "runs")


def store(row: dict[str, Any], settings: dict[str, Any], key: str) -> None:
    """Put one row into the file of results, in place of an older one of the same toy and seed."""
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if kept.get("settings", {}).get(key, settings) != settings:
        kept = {k: v for k, v in kept.items() if k != key}  # rows of another recipe do not belong beside these
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ebm_lit": __version__}
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    rows = [r for r in kept.get(key, []) if (r["toy"], r["seed"]) != (row["toy"], row["seed"])] + [row]
    order = list(TARGETS)
    kept |= {"machine": machine, "versions": versions, "targets": TARGETS}
    kept["settings"] = kept.get("settings", {}) | {key: settings}
    kept[key] = sorted(rows, key=lambda r: (order.index(r["toy"]), r["seed"]))
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
