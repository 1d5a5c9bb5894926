"""Reweighted walkers of benchmarks/mnist_density.py are exact where everything is known, and the script runs."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ebm_lit.energy import energy_and_grad
from ebm_lit.evaluation import weight_summary
from ebm_lit.pretrained import model_card

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results" / "mnist_density.json"
Factory = Callable[..., torch.Generator]
N = 200_000
LAMBDAS = [1.0 + 8.0 * k / 12 for k in range(13)]  # Z = 2π/λ on the plane


@pytest.fixture
def density(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/mnist_density.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import mnist_density

    return mnist_density


def spring(stiffness: float) -> Callable[[Tensor], Tensor]:
    return lambda x: stiffness * x.square().sum(1) / 2


def walk(density: ModuleType, h: float, generator: torch.Generator, work_alone: bool = False) -> Any:
    """Walkers on a spring that grows nine times as stiff in twelve steps; their weights, or the work done on them."""
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    walkers = density.Walkers(x, *energy_and_grad(spring(LAMBDAS[0]), x), x.new_zeros(N))
    for stiffness in LAMBDAS[1:]:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        moved = density.jarzynski_step(walkers, spring(stiffness), h, noise)
        if work_alone:
            moved = moved._replace(log_w=walkers.log_w + walkers.energy - spring(stiffness)(walkers.x))
        walkers = moved
    return walkers


def errors(walkers: Any, log_z: float) -> tuple[float, float]:
    """Standard errors that log Z and the mean of ‖x‖² are away from the truth."""
    found = weight_summary(walkers.log_w)
    of_log_z = (float(found.log_mean) - log_z) / float(found.standard_error)
    w, f = walkers.log_w.softmax(0), walkers.x.square().sum(1)
    mean = float((w * f).sum())
    of_mean = (mean - 2 / LAMBDAS[-1]) / float((w * (f - mean)).square().sum().sqrt())
    return of_log_z, of_mean


@pytest.mark.parametrize("h", [0.02, 0.1])
def test_reweighted_walkers_are_exact_however_far_they_lag(
    density: ModuleType, h: float, make_generator: Factory
) -> None:
    """At h = 0.02 they lag far behind, at 0.1 the steps are coarse. Within 5.7 standard errors, false alarms 5e-8.

    Power: work alone is caught by the next test.
    """
    walkers = walk(density, h, make_generator(0))
    assert max(map(abs, errors(walkers, -math.log(LAMBDAS[-1])))) < 5.7
    plain = float(walkers.x.square().sum(1).mean())  # without their weights
    assert plain > 1.5 * 2 / LAMBDAS[-1], "the walkers need no weights: the test shows nothing"


def test_power_work_alone_is_caught(density: ModuleType, make_generator: Factory) -> None:
    """Work at the old place is exact only for steps that keep each energy's law; unadjusted ones of h = 0.1 do not."""
    walkers = walk(density, 0.1, make_generator(0), work_alone=True)
    assert max(map(abs, errors(walkers, -math.log(LAMBDAS[-1])))) > 12


def test_log_z_adds_up_over_resampling(density: ModuleType, make_generator: Factory) -> None:
    """40 populations of 500 that are resampled on the way; within 7.5 standard errors, false alarms 5e-9.

    Power: log Z after a missed or doubled entry is 0.7 off, more than thirty of them.
    """
    found, sizes = [], []
    for seed in range(40):
        g = make_generator(seed)
        x = torch.randn(500, 2, generator=g, dtype=torch.float64)
        population = density.Population(x, spring(LAMBDAS[0]), math.log(2 * math.pi), 0.02, g)
        for stiffness in LAMBDAS[1:]:
            population.follow(spring(stiffness))
        found.append(population.log_z - math.log(2 * math.pi / LAMBDAS[-1]))
        sizes.append((population.resampled, len(population.ancestors.unique()), population.worst))
    off = torch.tensor(found, dtype=torch.float64)
    assert all(resampled >= 1 and ancestors < 500 and worst < 250 for resampled, ancestors, worst in sizes)
    assert float(off.std()) < 0.2
    ratio = off.exp()  # of mean 1 without bias
    assert abs(float(ratio.mean()) - 1) < 7.5 * float(ratio.std()) / math.sqrt(40)  # Student's t with 39 degrees


def test_resampling_keeps_every_walker_as_often_as_its_weight_says(density: ModuleType) -> None:
    """As often as the weight says up to one copy each time, and to a thousandth on average over evenly spaced u."""
    g = torch.Generator().manual_seed(1)
    n, rounds = 200, 1000
    log_w = torch.randn(n, generator=g)
    x = torch.arange(float(n)).view(n, 1)
    walkers = density.Walkers(x, 2 * x[:, 0], 3 * x, log_w)
    expected, total = n * log_w.double().softmax(0), torch.zeros(n, dtype=torch.float64)
    for k in range(rounds):
        moved, parents = density.resample(walkers, torch.tensor((k + 0.5) / rounds, dtype=torch.float64))
        counts = torch.bincount(parents, minlength=n)
        assert bool(((counts - expected).abs() < 1 + 1e-9).all()) and int(counts.sum()) == n
        total += counts
    assert float((total / rounds - expected).abs().max()) <= 1.001 / rounds
    chosen = moved.x[:, 0]
    assert torch.equal(chosen, parents.float()) and torch.equal(moved.grad, 3 * moved.x)
    assert torch.equal(moved.energy, 2 * chosen) and not moved.log_w.any()


def test_small_run() -> None:
    """The documented small size, both ways, in a process of its own."""
    from ebm_lit.data import DataNotFoundError, mnist

    try:
        mnist("train"), mnist("test")
    except DataNotFoundError as missing:
        pytest.skip(str(missing).splitlines()[0])
    command = [sys.executable, str(ROOT / "benchmarks" / "mnist_density.py"), "all", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum("taken" in row for row in rows) == 13 and sum("ancestors" in row for row in rows) == 20
    assert all(row["ancestors"] <= 64 for row in rows if "ancestors" in row)


def test_stored_results_are_whole() -> None:
    """What chapter 5 says of both ways is read from here."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    taken = {(row["where"], row["eta"]): row["taken"] for row in stored["metropolis"]["acceptance"]}
    assert len(taken) == 10 and max(v for (where, _), v in taken.items() if where == "within the box") == 0
    chains = [row["chain"] for row in stored["metropolis"]["drift"]]
    assert [chains.count(name) for name in ("Metropolis, λ = 0.03", "Metropolis, λ = 0.1", "the recipe's")] == [3, 3, 3]
    assert stored["metropolis"]["weights"] == model_card("mnist")["sha256"], "run again for the weights now shipped"
    for run in stored["reweighted"]:
        assert run["rows"][-1]["iteration"] == run["iterations"] and run["judged"]["n"] == run["walkers"]
