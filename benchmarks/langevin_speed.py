"""Speed of Langevin chains and of training: this library, a plain loop, torchebm and ebmkit, on the same function.

    pip install -e '.[bench]'                              the two other libraries; without them they are left out
    python benchmarks/langevin_speed.py                    everything, ten minutes on two cores
    python benchmarks/langevin_speed.py --store            and write benchmarks/results/langevin_speed_cpu.json
    python benchmarks/langevin_speed.py --device cuda      the same on a GPU (langevin_speed_cuda.json)
    python benchmarks/langevin_speed.py --only cnn_128     some of the cases, by their names
    python benchmarks/langevin_speed.py --smoke            tiny sizes, half a minute: does everything still run?

All contenders get copies of the same network, the same starts and the same law of the noise, in one process, in turns:
each repeat times every contender once, in an order that rotates. Ratios are formed within a repeat, so that a machine
that is slow for a while is slow for all. The first call is timed apart. A run ends with status 1 and stores nothing if
a contender's samples, or our gradients, are not those of the plain network.

Each case has a process of its own. glibc keeps the more freed memory, the larger the largest block of up to 32 MB that
was ever freed (`mallopt(3)`: the dynamic mmap threshold). After the matrices of the floor, or after another case, who
allocates in every step would be faster than in a program that only makes these chains. How much that is, the case "a
large block freed before" shows.
Our sampler with `accelerate="compile"` has processes of its own, too, against our sampler as it is: where compiled
code brings a second OpenMP, everybody is slower in its company.
"""

import argparse
import copy
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ebm_lit import EnergyCNN, EnergyMLP, Langevin, TrainConfig, __version__, digits, energy_and_grad
from ebm_lit.pretrained import RECIPES
from ebm_lit.training import resolve_device

from contenders import CHAINS, COMPILED, OURS, PEERS, TEXTBOOK, TRAININGS, ChainCase, NotCompiled
from contenders import contenders, textbook_chain

RESULTS = Path(__file__).resolve().parent / "results"
Z_LIMIT = 5.0  # |z| beyond it: another law; false alarms 6e-7 a comparison of many chains, 5e-5 a run
GRAD_TOLERANCE = 1e-5  # of our gradients and energies against float64, relative to the largest
CHAIN_TOLERANCE = 1e-3  # of a whole chain without noise against the plain loop, in units of x
MOVE_LIMIT = 2.0  # training: how far weights moved, against the textbook's, at most this factor either way

Seconds = dict[str, list[float]]


# The cases


def _cnn(batch: int, n_steps: int) -> ChainCase:
    return ChainCase(f"CNN 28×28, {batch} chains", "cnn", batch, n_steps, 10.0, 0.005, (-1.0, 1.0), 1.0)


def _mlp(batch: int, n_steps: int) -> ChainCase:
    return ChainCase(f"MLP 2-D, {batch} chains", "mlp", batch, n_steps, 0.1, math.sqrt(0.2), None, 4.0)  # T = 1


@dataclass(frozen=True)
class TrainCase:
    """Whole training iterations on 28×28 images: `n_updates` of them are timed at once."""

    title: str
    config: TrainConfig
    n_updates: int
    n_data: int = 1297
    repeats: int = 10


_K60 = TrainConfig(
    n_iterations=1800,
    batch_size=128,
    n_steps=60,
    step_size=10.0,
    noise_scale=0.005,
    buffer_size=8192,
    reinit_prob=0.1,
    learning_rate=1e-4,
)  # α = 0.01, data noise, β₁ = 0, clip, EMA: the defaults
# What the others can do of our recipe for MNIST: chains that do not begin hot, a fixed share of restarts (the recipe's
# own are by age; a life of s·ln(1 + A/s) = 287 steps, seven a visit, is a share of 0.025), one update for each walk.
_MNIST = replace(RECIPES["mnist"], noise_start=None, anneal_steps=0, minibatches=1, reinit_age=None, reinit_prob=0.025)

CHAIN_CASES = {
    "cnn_16": _cnn(16, 60),
    "cnn_128": _cnn(128, 60),
    "cnn_1024": _cnn(1024, 5),
    "mlp_256": _mlp(256, 200),
    "mlp_4096": _mlp(4096, 30),
    "mlp_4096_kept": replace(_mlp(4096, 30), title="the same, a large block freed before", freed=2**24),
}


def _formula(kind: str, title: str, batch: int) -> ChainCase:
    return ChainCase(f"{title}, {batch} chains", kind, batch, 200, 0.01, math.sqrt(0.02), None, 2.0)  # T = 1


# Energies that we have no gradient for: autograd or the compiler
FORMULA_CASES = {
    "double_well": _formula("double_well", "double_well", 1000),
    "mixture": _formula("mixture", 'toy("mixture")', 1000),
    "rings": _formula("rings", 'toy("rings")', 10_000),
}
TRAIN_CASES = {
    "train_60": TrainCase("training, K = 60, batch 128", _K60, n_updates=1),
    "train_mnist": TrainCase(
        f"training, K = {_MNIST.n_steps}, batch 128, half the width (MNIST recipe)", _MNIST, n_updates=2
    ),
}
MEMORY_STEPS, MEMORY_ROUNDS, MEMORY_CHAINS = (100, 10_000), 2, 1024

SMOKE_CHAINS = {
    "cnn_16": replace(_cnn(16, 4), repeats=2),
    "mlp_256": replace(_mlp(256, 10), repeats=2),
}
SMOKE_TRAIN = {
    "train_60": TrainCase(
        "training, K = 4, batch 16", replace(_K60, n_steps=4, batch_size=16, buffer_size=64), 1, n_data=64, repeats=2
    )
}


# Timing


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(action: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device has finished, and what the action returned."""
    synchronize(device)
    start = time.perf_counter()
    result = action()
    synchronize(device)
    return time.perf_counter() - start, result


def page_faults() -> int:
    """Pages of memory that the system has given this process so far; 0 on Windows, which does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def in_turns(names: list[str], repeats: int) -> Iterator[tuple[int, str]]:
    """Every name once a repeat; the order rotates, and turns round after every full rotation."""
    for r in range(repeats):
        order = names[r % len(names) :] + names[: r % len(names)]
        for name in reversed(order) if (r // len(names)) % 2 else order:
            yield r, name


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and range."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high, "min": min(values), "max": max(values)}


def summary(seconds: Seconds, work: float) -> dict[str, Any]:
    """Rates (work per second) and, repeat by repeat, how much longer the others took than we did."""
    rates = {name: work / statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: spread([t / o for t, o in zip(values, seconds[OURS], strict=True)])
        for name, values in seconds.items()
        if name != OURS
    }
    fastest = min(ratios, key=lambda name: ratios[name]["median"])
    rounded = {name: [round(t, 6) for t in values] for name, values in seconds.items()}
    return {"seconds": rounded, "rate": rates, "ratio": ratios, "fastest_peer": fastest}


# Does everybody compute the same thing?


@torch.no_grad()
def chain_statistics(net: nn.Module, x: Tensor, x0: Tensor | None = None) -> Tensor:
    """(B, 4): each chain's mean, mean square, energy and, from known starts, mean square of its way; float64."""
    flat, energy = x.flatten(1).double(), net(x).double()
    way = flat if x0 is None else flat - x0.flatten(1)
    return torch.stack([flat.mean(1), flat.square().mean(1), energy, way.square().mean(1)], dim=1).cpu()


def compare_laws(rows: dict[str, Tensor], paired: bool) -> dict[str, dict[str, float]]:
    """Moments of each contender's samples and their largest |z| against the textbook's.

    Paired: chains from the same starts, whose differences have mean zero if both draw from the same law.
    """
    reference, found = rows[TEXTBOOK], {}
    for name, row in rows.items():
        mean, mean_square, energy, _ = row.mean(0).tolist()
        moments = {"mean": mean, "std": math.sqrt(mean_square - mean**2), "energy": energy}
        if name != TEXTBOOK:
            if paired:
                error = (row - reference).std(0) / math.sqrt(len(row))
            else:
                error = (row.var(0) / len(row) + reference.var(0) / len(reference)).sqrt()
            moments["z"] = float(((row.mean(0) - reference.mean(0)) / error).abs().max())
        found[name] = moments
    return found


def complaints(title: str, moments: dict[str, dict[str, float]]) -> list[str]:
    """One line for everybody whose samples follow another law; NaN complains, too."""
    bad = {name: m["z"] for name, m in moments.items() if "z" in m and not m["z"] <= Z_LIMIT}
    return [f"{title}: the samples of {name} differ from the textbook's, |z| = {z:.1f}" for name, z in bad.items()]


def agreement(net: nn.Module, case: ChainCase, x: Tensor) -> dict[str, Any]:
    """Our sampler, through its public interface, against the plain network in float64 and against the plain loop.

    One step without noise and with a huge step size η gives back the gradient that the sampler used, (x − x′)/η.
    """
    eta = 1024.0
    probe = Langevin(eta, 1, noise_scale=0.0).run(net, x, diagnostics=True)
    assert probe.diagnostics is not None
    if x.device.type == "mps":  # has no float64
        exact_e, exact_grad = energy_and_grad(copy.deepcopy(net).cpu().double(), x.cpu().double())
    else:
        exact_e, exact_grad = energy_and_grad(copy.deepcopy(net).double(), x.double())
    grad = ((x - probe.x) / eta).to(exact_grad)
    quiet = Langevin(case.step_size, case.n_steps, noise_scale=0.0, bounds=case.bounds).run(net, x)
    plain = textbook_chain(net, x, case.n_steps, case.step_size, 0.0, case.bounds)
    energy_error = (probe.diagnostics.energy[0].to(exact_e) - exact_e.mean()).abs() / exact_e.abs().max()
    return {
        "gradient": float((grad - exact_grad).abs().max() / exact_grad.abs().max()),
        "energy": float(energy_error),
        "chain_without_noise": float((quiet.x - plain).abs().max()),
        "engine": quiet.engine,
    }


def disagreements(title: str, found: dict[str, Any]) -> list[str]:
    limits = {"gradient": GRAD_TOLERANCE, "energy": GRAD_TOLERANCE, "chain_without_noise": CHAIN_TOLERANCE}
    return [
        f"{title}: our {key} is off by {found[key]:.2g}, allowed {limit:g}"
        for key, limit in limits.items()
        if not found[key] <= limit
    ]


# The floor


def matrix_peak(device: torch.device, sizes: tuple[int, ...]) -> dict[str, float]:
    """FLOP/s of square float32 matrix products, the best of five, for each size: a peak is not an average."""
    found = {}
    for n in sizes:
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        torch.mm(a, b)
        seconds = [timed(lambda a=a, b=b: torch.mm(a, b), device)[0] for _ in range(5)]
        found[str(n)] = 2 * n**3 / min(seconds)
    return found


def flops_per_step(net: nn.Module, x: Tensor) -> int:
    """Of the energy and its input gradient, counted on the plain network with its parameters frozen."""
    plain = copy.deepcopy(net).requires_grad_(False)
    x = x.detach().requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        plain(x).sum().backward()  # reaches x alone
    return counter.get_total_flops()


# Running


def run_chains(case: ChainCase, names: list[str], device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """One case: timings, ratios, moments, agreement, work; and what is wrong."""
    torch.empty(case.freed, dtype=torch.uint8)  # is freed at once, and glibc remembers its size
    reference = case.network(device)
    chains = {name: CHAINS[name](copy.deepcopy(reference), case, device) for name in names}
    first = {}
    for name, chain in chains.items():
        first[name] = timed(lambda chain=chain: chain(case.starts(-1, device)), device)[0]
        chain(case.starts(-1, device))
    seconds: Seconds = {name: [] for name in names}
    faults: dict[str, list[int]] = {name: [] for name in names}
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for r, name in in_turns(names, case.repeats):
        x0, before = case.starts(r, device), page_faults()
        elapsed, x = timed(lambda name=name, x0=x0: chains[name](x0), device)
        faults[name].append(page_faults() - before)
        seconds[name].append(elapsed)
        rows[name].append(chain_statistics(reference, x, x0))
    moments = compare_laws({name: torch.cat(parts) for name, parts in rows.items()}, paired=True)
    agrees = agreement(reference, case, case.starts(0, device))
    result = {
        "title": case.title,
        "kind": case.kind,
        "unit": "samples × steps / s",
        "batch": case.batch,
        "n_steps": case.n_steps,
        "step_size": case.step_size,
        "noise_scale": case.noise_scale,
        "bounds": case.bounds,
        "freed": case.freed,
        "repeats": case.repeats,
        **summary(seconds, case.batch * case.n_steps),
        "page_faults": faults,
        "first_call_seconds": first,
        "flops_per_step": flops_per_step(reference, case.starts(0, device)),
        "moments": moments,
        "agreement": agrees,
    }
    return result, complaints(case.title, moments) + disagreements(case.title, agrees)


def run_compiled(case: ChainCase, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """One case through `torch.compile`, against our sampler as it comes: ratio of times, seconds of the first call."""
    try:
        found, wrong = run_chains(case, [OURS, TEXTBOOK, COMPILED], device)
    except NotCompiled as error:
        return {"gave_up": str(error)}, []
    seconds = {name: found["seconds"][name] for name in (OURS, COMPILED)}
    return {
        "ratio": found["ratio"][COMPILED],
        "first_call_seconds": found["first_call_seconds"][COMPILED],
        "seconds": seconds,
        "z": found["moments"][COMPILED]["z"],
    }, wrong


def training_data(n: int, device: torch.device) -> Tensor:
    """Handwritten digits that come with scikit-learn, enlarged to 28×28: only their size matters here."""
    x = F.interpolate(digits("train")[0][:n], size=(28, 28), mode="bilinear", align_corners=False)
    return x.clamp(-1, 1).to(device)


def run_training(case: TrainCase, names: list[str], device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """One training case; negatives are compared after the first update, when all networks are still the same."""
    cfg, x_data = case.config, training_data(case.n_data, device)
    reference = EnergyCNN((1, 28, 28), cfg.width, cfg.hidden, torch.Generator().manual_seed(0)).to(device)
    runs = {name: TRAININGS[name](copy.deepcopy(reference), cfg, x_data) for name in names}
    first, rows = {}, {}
    for name, run in runs.items():
        first[name] = timed(lambda run=run: run.advance(1), device)[0]
        rows[name] = chain_statistics(reference, run.negatives())
        run.advance(1)
    seconds: Seconds = {name: [] for name in names}
    for _, name in in_turns(names, case.repeats):
        seconds[name].append(timed(lambda name=name: runs[name].advance(case.n_updates), device)[0])
    moments = compare_laws(rows, paired=False)
    moved = {name: distance(run.net, reference) for name, run in runs.items()}
    wrong = complaints(case.title, moments)
    for name, value in moved.items():
        if not 1 / MOVE_LIMIT <= value / moved[TEXTBOOK] <= MOVE_LIMIT:
            wrong.append(f"{case.title}: {name} moved its weights by {value:.3g}, textbook by {moved[TEXTBOOK]:.3g}")
    result = {
        "title": case.title,
        "kind": "training",
        "unit": "images / s",
        "batch": cfg.batch_size,
        "n_steps": cfg.n_steps,
        "step_size": cfg.step_size,
        "noise_scale": cfg.noise_scale,
        "bounds": cfg.bounds,
        "repeats": case.repeats,
        **summary(seconds, cfg.batch_size * case.n_updates),
        "first_call_seconds": first,
        "moments": moments,
        "weights_moved": moved,
    }
    return result, wrong


def distance(a: nn.Module, b: nn.Module) -> float:
    """Euclidean distance between two sets of weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return math.sqrt(sum(float((p.detach() - q.detach()).square().sum()) for p, q in pairs))


# Processes of their own


def in_child(flags: list[str], device: torch.device) -> Any:
    """What this script, called with these flags, prints as its last line."""
    command = [sys.executable, str(Path(__file__).resolve()), *flags, "--device", str(device)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # its warnings go to the terminal
    if done.returncode:
        raise RuntimeError(f"{' '.join(flags)} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def case_child(key: str, args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """One case among all contenders that are present, or ours through the compiler; and what is wrong."""
    chains, trainings = (SMOKE_CHAINS, SMOKE_TRAIN) if args.smoke else (CHAIN_CASES | FORMULA_CASES, TRAIN_CASES)
    case = chains[key] if key in chains else trainings[key]
    case = replace(case, repeats=args.repeats or case.repeats)
    names = contenders()[0]
    if isinstance(case, TrainCase):
        return run_training(case, names, device)
    return run_compiled(case, device) if args.compiled else run_chains(case, names, device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process ever had in memory, or that was ever allocated on the GPU.

    From the kernel's VmHWM, because `ru_maxrss` of a new process begins with its parent's.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def memory_child(name: str, lengths: list[int], device: torch.device) -> list[int]:
    """Peak memory after chains of growing length: a small MLP and many points, so that whatever is kept shows."""
    peaks = []
    for n_steps in lengths:
        case = _mlp(MEMORY_CHAINS, n_steps)
        net = EnergyMLP(width=16, depth=2, generator=torch.Generator().manual_seed(0)).to(device)
        CHAINS[name](net, case, device)(case.starts(0, device))
        synchronize(device)
        peaks.append(peak_memory(device))
    return peaks


def run_memory(names: list[str], device: torch.device, lengths: tuple[int, int], rounds: int) -> dict[str, Any]:
    """By how much a long chain raises the peak memory of a process that has already made a short one."""
    if device.type != "cuda" and not Path("/proc/self/status").exists():
        return {"skipped": "the peak memory of a process is read from /proc, which is not there"}
    peaks: dict[str, list[list[int]]] = {name: [] for name in names}
    for _, name in in_turns(names, rounds):
        peaks[name].append(in_child(["--memory-child", name, *map(str, lengths)], device))
    all_states = 4 * 2 * MEMORY_CHAINS * lengths[1]  # what keeping every state would take
    ratios = {name: [long / short for short, long in found] for name, found in peaks.items()}
    return {"lengths": lengths, "bytes_of_all_states": all_states, "peak_bytes": peaks, "ratio": ratios}


# The machine, the report


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "cpu": cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
    }
    return facts | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def versions(names: list[str]) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, OURS: __version__}
    return found | {name: importlib.metadata.version(name) for name in names if name in PEERS}


def load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def table(cases: dict[str, Any]) -> str:
    """The results as Markdown: rates, and ratios to ours as median [quartiles]."""
    names = [OURS, *sorted({name for case in cases.values() for name in case["ratio"]}, key=list(CHAINS).index)]
    lines = [f"| case | {' | '.join(names)} | fastest other / ours |", "|---|" + "---|" * (len(names) + 1)]
    for case in cases.values():
        rates = [f"{case['rate'][name]:,.0f}" if name in case["rate"] else "–" for name in names]
        r = case["ratio"][case["fastest_peer"]]
        verdict = f"{r['median']:.2f} [{r['q25']:.2f}, {r['q75']:.2f}] {case['fastest_peer']}"
        lines.append(f"| {case['title']}, {case['unit']} | {' | '.join(rates)} | {verdict} |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*CHAIN_CASES, *TRAIN_CASES, *FORMULA_CASES, "memory"]
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: one for each core")
    parser.add_argument("--repeats", type=int, help="interleaved repeats; default: 10")
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="CASE", help=", ".join(known))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that everything runs, not how fast")
    parser.add_argument("--store", action="store_true", help="write benchmarks/results/langevin_speed_DEVICE.json")
    parser.add_argument("--output", type=Path, help="write the results to this file")
    parser.add_argument("--case-child", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-child", nargs=3, metavar=("NAME", "SHORT", "LONG"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats is not None and args.repeats < 2:
        parser.error("--repeats must be at least 2")
    if args.smoke and not {*SMOKE_CHAINS, *SMOKE_TRAIN, "memory"} & {*args.only}:
        parser.error(f"--smoke measures only {', '.join([*SMOKE_CHAINS, *SMOKE_TRAIN, 'memory'])}")
    if args.store and (args.smoke or args.only != known or (args.repeats or 10) < 10):
        parser.error("--store is for complete runs of at least ten repeats")
    return args


def measure(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """Everything that was asked for, and what is wrong with it."""
    names, skipped = contenders()
    for name, reason in skipped.items():
        print(f"without {name}: {reason}", flush=True)
    sizes = (256,) if args.smoke else (512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192)
    before, began = load(), time.perf_counter()
    gemm = [matrix_peak(device, sizes)]
    cases: dict[str, Any] = {}
    wrong: list[str] = []
    flags = [*(["--smoke"] if args.smoke else []), *(["--repeats", str(args.repeats)] if args.repeats else [])]
    known = [*SMOKE_CHAINS, *SMOKE_TRAIN] if args.smoke else [*CHAIN_CASES, *TRAIN_CASES]
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":  # there the freed block has no meaning
        known = [key for key in known if key not in CHAIN_CASES or not CHAIN_CASES[key].freed]
    for key in [key for key in known if key in args.only]:
        cases[key], bad = in_child(["--case-child", key, *flags], device)
        wrong += bad
        gemm.append(matrix_peak(device, sizes))
        print(table({key: cases[key]}).splitlines()[-1], flush=True)
    peak = max(max(found.values()) for found in gemm)
    for case in cases.values():
        if "flops_per_step" in case:
            work = case["flops_per_step"] / case["batch"]  # a sample's step
            case["share_of_peak"] = {name: rate * work / peak for name, rate in case["rate"].items()}
    memory: dict[str, Any] = {"skipped": "not asked for"}
    if "memory" in args.only:
        lengths, rounds = ((10, 300), 1) if args.smoke else (MEMORY_STEPS, MEMORY_ROUNDS)
        memory = run_memory(names[:1] if args.smoke else names, device, lengths, rounds)
    formulas: dict[str, Any] = {key: {"title": FORMULA_CASES[key].title} for key in FORMULA_CASES if key in args.only}
    if not args.smoke:  # compiling takes longer than all of a smoke run
        networks = [key for key, case in CHAIN_CASES.items() if key in cases and not case.freed]
        for key, case in [(key, cases[key]) for key in networks] + list(formulas.items()):
            found, bad = in_child(["--case-child", key, "--compiled", *flags], device)
            case["compiled"] = found
            wrong += bad
            said = f"{found['ratio']['median']:.2f} times ours" if "ratio" in found else found["gave_up"]
            print(f"{case['title']}, compiled: {said}", flush=True)
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(device),
        "versions": versions(names),
        "skipped": skipped,
        "load_before_and_after": [before, load()],
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "float32": "TF32 is off",
        "limits": {"z": Z_LIMIT, "gradient": GRAD_TOLERANCE, "chain_without_noise": CHAIN_TOLERANCE},
        "matrix_product": {"peak_flops": peak, "by_size": gemm},
        "cases": cases,
        "formulas": {} if args.smoke else formulas,
        "memory": memory,
    }
    return report, wrong


def main() -> int:
    args = options()
    device = resolve_device(args.device)
    if device.type == "cpu":
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(args.threads or allowed)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)  # the others draw from the global generator
    if args.memory_child:
        name, *lengths = args.memory_child
        print(json.dumps(memory_child(name, list(map(int, lengths)), device)))
        return 0
    if args.case_child:
        print(json.dumps(case_child(args.case_child, args, device)))
        return 0
    report, wrong = measure(args, device)
    print()
    print(table(report["cases"]))
    for case in [*report["cases"].values(), *report["formulas"].values()]:
        if "ratio" in (found := case.get("compiled", {})):
            r, first = found["ratio"], found["first_call_seconds"]
            spread_of = f"{r['median']:.2f} [{r['q25']:.2f}, {r['q75']:.2f}]"
            print(f"{case['title']}, compiled / ours: {spread_of}, first call {first:.0f} s")
    print(f"\nmatrix product: {report['matrix_product']['peak_flops'] / 1e9:.1f} GFLOP/s; share of it:")
    for case in report["cases"].values():
        if "share_of_peak" in case:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in case["share_of_peak"].items())
            print(f"  {case['title']}: {shares}")
    for name, ratios in report["memory"].get("ratio", {}).items():
        short, long = report["memory"]["lengths"]
        print(f"peak memory, {long} steps against {short}, {name}: {statistics.median(ratios):.4f}")
    for line in wrong:
        print(f"WRONG: {line}")
    target = RESULTS / f"langevin_speed_{device.type}.json" if args.store else args.output
    if target is not None and not wrong:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {target.name}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
