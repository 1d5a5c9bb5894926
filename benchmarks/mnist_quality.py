"""Quality of the MNIST recipe: train from several seeds, judge chains from uniform noise, change one choice at a time.

    python benchmarks/mnist_quality.py                       one seed, table on standard output
    python benchmarks/mnist_quality.py --seeds 5 --store     and write benchmarks/results/mnist_quality.json
    python benchmarks/mnist_quality.py --train-only --first 5 --seeds 5 --store    more seeds: does any diverge?
    python benchmarks/mnist_quality.py --ablations --store   what happens without each choice (mnist_ablations.json)
    python benchmarks/mnist_quality.py --ship                the first seed (0) into the package, with a new card
    python benchmarks/mnist_quality.py --large               10,000 samples of the shipped model, onto its card

Samples are 2,000 chains of the averaged network from uniform noise at the nominal length; 500 of them go on, to ten
times that length (ablations: 500, of which 300 go on to five times it, none of them denoised). They are compared with
equally many real images that neither the model nor the judge has seen: the 10,000 test images and the last 10,000
training images, which the recipe leaves out. The floor is the same distance between real images.
"""

import argparse
import base64
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mnist_judge import N_SEEN
from PIL import Image
from shipping import WEIGHTS, about, ship
from torch import Tensor
from torch.func import functional_call

from ebm_lit import training
from ebm_lit.contrastive_divergence import cd_loss
from ebm_lit.data import mnist
from ebm_lit.energy import count_parameters
from ebm_lit.pretrained import RECIPES, judge_digits, load_pretrained
from ebm_lit.training import (
    DivergenceError,
    TrainConfig,
    TrainState,
    denoise,
    finish,
    generate,
    resolve_device,
    train,
    write_atomically,
)

RESULTS = Path(__file__).resolve().parent / "results"
RECIPE = RECIPES["mnist"]

# Ablations are compared with the recipe at this length, so that each takes a few minutes.
SHORTER = {"n_iterations": RECIPE.n_iterations // 2, "on_divergence": "stop"}

# What happens without each choice: a name for the table, and what is set instead (no setting of that name: a trick).
ABLATIONS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "no annealing: σ is the same at every age": {"noise_start": None, "anneal_steps": 0},
    "annealed chains, but data with constant noise": {"match": False},
    "annealing in half the steps": {"anneal_steps": RECIPE.anneal_steps // 2},
    "annealing in 300 steps, length 400": {"anneal_steps": 300, "sample_steps": 400},
    "annealing from three times the noise": {"noise_start": 3 * (RECIPE.noise_start or 0.0)},
    "chains younger than 20 steps do not count": {"youngest": 20},
    "one update for each walk, half as many": {"minibatches": 1},
    "four updates for each walk": {
        "batch_size": 256,
        "minibatches": 4,
        "n_iterations": RECIPE.n_iterations // 4,
        "buffer_size": 512,
    },
    "learning rate 0.003": {"learning_rate": 0.003},
    "learning rate 0.01": {"learning_rate": 0.01},
    "constant learning rate": {"schedule": "constant"},
    "a learning rate that falls to zero": {"final_rate": 0.0},
    "5 steps instead of 7": {"n_steps": 5},
    "10 steps instead of 7": {"n_steps": 10},
    "a third of η": {"step_size": RECIPE.step_size / 3},
    "half of σ, at every age": {"noise_scale": RECIPE.noise_scale / 2, "noise_start": (RECIPE.noise_start or 0.0) / 2},
    "no noise on the data": {"data_noise": 0.0},
    "without the regulariser": {"alpha": 0.0},
    "without averaging": {"ema_decay": 0.0},
    "1,024 slots": {"buffer_size": 1024},
    "4,096 slots: young chains": {"buffer_size": 4096},
    "restart with 3 %: young chains": {"reinit_age": None, "reinit_prob": 0.03},
    "never restart": {"reinit_age": None, "reinit_prob": 0.0},
    "with the neglected term": {"kl": 1.0},
    "with a gradient penalty": {"gradient_penalty": 0.1},
}


def data() -> tuple[Tensor, Tensor]:
    """What a model may see, and 20,000 images that it may not."""
    x, held_out = mnist("train")[0], mnist("test")[0]
    return x[:N_SEEN], torch.cat([x[N_SEEN:], held_out])


def facts(x: Tensor, real: Tensor) -> dict[str, Any]:
    """The judge's words about samples, rounded, as plain numbers."""
    r = judge_digits(x, real)
    found = {"n": r.n, "frechet": r.frechet, "floor": r.floor, "over_floor": r.ratio, "confident": r.confident}
    found |= {"smallest_class": float(r.shares.min()), "largest_class": float(r.shares.max())}
    found |= {"shares": r.shares.tolist(), "precision": r.precision, "recall": r.recall}
    return {k: [round(i, 4) for i in v] if isinstance(v, list) else round(v, 4) for k, v in found.items()}


def strip(x: Tensor) -> str:
    """Images (n, 1, 28, 28) in a row as PNG, in base64."""
    row = ((x[:, 0].permute(1, 0, 2).reshape(28, -1) + 1) * 127.5).clamp(0, 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(row).quantize(16).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def lengths(
    state: TrainState, real: Tensor, n: int, n_long: int, factor: int, seed: int
) -> tuple[dict[str, Any], str]:  # what the judge says by length, and a picture of eight chains at each length
    """Chains of the nominal length; the first of them go on, to a multiple of it."""
    sampler, network, steps = state.config.sampler, state.ema.module, state.config.sample_steps
    generator = torch.Generator(state.history.device).manual_seed(1000 + seed)
    began = time.perf_counter()
    parts = generate(state, n, 0, generator, finished=False).x.split(1000)
    x = torch.cat([sampler.sample(network, part, steps, generator) for part in parts])
    done = finish(state, x)
    seconds = time.perf_counter() - began
    few = sampler.sample(network, x[:n_long], (factor - 1) * steps, generator, ages=steps)
    thousand = facts(done[:1000], real)
    rows: dict[str, Any] = {
        str(steps): {
            "seconds": round(seconds, 1),
            **facts(done, real),
            "first_1000": {k: thousand[k] for k in ("confident", "smallest_class")},
            "frechet_of_the_few": facts(done[:n_long], real)["frechet"],
        },
        str(factor * steps): facts(finish(state, few), real),
    }
    # The other way, too: with the noise still in where the recipe takes it out, and without it where it does not.
    config = state.config
    name, other = "not_denoised", (x, few)
    if not config.denoise:
        settings = config.data_noise, config.sampler.implied_temperature, config.bounds
        name, other = "denoised", (denoise(network, x, *settings), denoise(network, few, *settings))
    rows[str(steps)][name] = {**facts(other[0], real), "frechet_of_the_few": facts(other[0][:n_long], real)["frechet"]}
    rows[str(factor * steps)][name] = facts(other[1], real)
    return rows, strip(finish(state, torch.cat([x[:8], few[:8]])).cpu())


Extra = Callable[[TrainState, Tensor, Tensor], Tensor]  # (state, x_pos, x_neg) -> a further term of the loss


def nothing(state: TrainState, x_pos: Tensor, x_neg: Tensor) -> Tensor:
    """No further term."""
    return x_neg.new_zeros(())


def step_with(extra: Extra, youngest: int = 0) -> Callable[[TrainState, Tensor], None]:
    """`train_step` with one more term in its loss, or without the pairs whose chain is of at most `youngest` steps."""

    @torch.enable_grad()
    def update(state: TrainState, x_pos: Tensor, x_neg: Tensor, old: Tensor) -> Tensor:
        cfg, energy = state.config, state.energy
        e_pos, e_neg = energy(torch.cat([x_pos, x_neg])).split(len(x_pos))
        usable = bool(old.any())  # not before the buffer's chains have grown so old
        e_pos, e_neg = (e[old] if usable else 0 * e for e in (e_pos, e_neg))
        loss, rate = cd_loss(e_pos, e_neg, cfg.alpha), training.learning_rate(cfg, state.step)
        state.optimizer.zero_grad()
        (loss.loss + extra(state, x_pos, x_neg)).backward()
        norm = torch.nn.utils.clip_grad_norm_(energy.parameters(), cfg.weight_grad_clip)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        state.ema.update_parameters(energy)
        found = loss.loss, loss.energy_gap, e_pos.mean(), e_neg.mean(), norm, (x_neg.abs() >= 1).float().mean()
        return torch.stack([v.detach() for v in found] + [torch.tensor(rate, device=x_pos.device)])

    def step(state: TrainState, x_data: Tensor) -> None:
        m, x_pos = state.config.minibatches, training.draw_data(state, x_data)
        x_neg, ages = training.draw_negatives(state, x_pos)
        x_pos = training.match_noise(state, x_pos, ages)
        parts = zip(x_pos.chunk(m), x_neg.chunk(m), (ages > youngest).chunk(m), strict=True)
        state.history[state.step] = torch.stack([update(state, *part) for part in parts]).mean(0)
        state.step += 1

    return step


def neglected_term(weight: float) -> Extra:
    """Mean energy of the negatives after one more step that is differentiated through, under weights held fixed.

    Contrastive divergence leaves it out. Source: Du, Li, Tenenbaum & Mordatch 2021, section 3.
    """

    def extra(state: TrainState, x_pos: Tensor, x_neg: Tensor) -> Tensor:
        x, cfg = x_neg.clone().requires_grad_(True), state.config
        (grad,) = torch.autograd.grad(state.energy(x).sum(), x, create_graph=True)
        noise = cfg.noise_scale * torch.randn(x.shape, generator=state.generator)
        moved = (x - cfg.step_size * grad + noise).clamp(-1, 1)  # with the noise of old chains
        fixed = {name: p.detach() for name, p in state.energy.named_parameters()}
        return weight * functional_call(state.energy, fixed, (moved,)).mean()

    return extra


def gradient_penalty(weight: float) -> Extra:
    """Mean of ‖∇ₓE‖² at the data: a smoother energy."""

    def extra(state: TrainState, x_pos: Tensor, x_neg: Tensor) -> Tensor:
        x = x_pos.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(state.energy(x).sum(), x, create_graph=True)
        return weight * grad.square().flatten(1).sum(1).mean()

    return extra


@contextmanager
def tricks(changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings among the changes, with what needs another training step in force."""
    settings = dict(changes)
    step, rate, match = training.train_step, training.learning_rate, training.match_noise
    for name, term in (("kl", neglected_term), ("gradient_penalty", gradient_penalty)):
        if (weight := settings.pop(name, None)) is not None:
            training.train_step = step_with(term(weight))
    if (youngest := settings.pop("youngest", None)) is not None:
        training.train_step = step_with(nothing, youngest)
    if settings.pop("schedule", None) == "constant":
        training.learning_rate = lambda c, s: c.learning_rate * min(1.0, (s + 1) / c.warmup)
    if not settings.pop("match", True):
        training.match_noise = lambda state, x_pos, ages: x_pos
    try:
        yield settings
    finally:
        training.train_step, training.learning_rate, training.match_noise = step, rate, match


def one_seed(
    config: TrainConfig,
    x: Tensor,
    real: Tensor,
    n: int,
    n_long: int,
    factor: int = 10,
) -> tuple[dict[str, Any], TrainState | None]:
    """Train, then judge; a run that diverges is a result, too."""
    began = time.perf_counter()
    try:
        state = train(x, config, progress=False)
    except DivergenceError as error:
        return {"seed": config.seed, "diverged": str(error)}, None
    row: dict[str, Any] = {"seed": config.seed, "train_seconds": round(time.perf_counter() - began, 1)}
    row |= {"threads": torch.get_num_threads(), "rollbacks": len(state.rollbacks)}
    if n:
        row["lengths"], row["picture"] = lengths(state, real, n, n_long, factor, config.seed)
    return row, state


def show(name: str, row: dict[str, Any]) -> None:
    """One line for each length."""
    if "diverged" in row:
        print(f"| {name} | {row['diverged']} |", flush=True)
    for steps, q in row.get("lengths", {}).items():
        print(
            f"| {name} | {row['train_seconds']:.0f} | {steps} | {q['frechet']:.1f} | {q['over_floor']:.2f} | "
            f"{q['confident']:.3f} | {q['smallest_class']:.3f} | {q['precision']:.2f} | {q['recall']:.2f} |",
            flush=True,
        )
    if not row.get("lengths") and "diverged" not in row:
        print(f"| {name} | {row['train_seconds']:.0f} | not judged |", flush=True)


def merge(path: Path, setting: dict[str, Any], rows: list[dict[str, Any]], key: str) -> None:
    """Add rows to the stored ones; those of another recipe, or of another length, are dropped."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = json.loads(json.dumps({k: setting.get(k) for k in ("recipe", "shorter")}))  # tuples are lists in JSON
    same = all(old.get(k) == v for k, v in wanted.items())
    kept = old["runs"] if same else []
    new = {row[key]: row for row in rows}
    merged = [row for row in kept if row[key] not in new] + rows
    order = list(ABLATIONS)
    merged.sort(key=lambda row: (order.index(row[key]), 0) if row[key] in order else (len(order), row[key]))
    RESULTS.mkdir(exist_ok=True)
    write_atomically(path, json.dumps({**setting, "runs": merged}, indent=1, ensure_ascii=False).encode() + b"\n")


def judge_large(real: Tensor, n: int = 10_000) -> None:
    """Judge many samples of the shipped model and write what was found onto its card."""
    state, g = load_pretrained("mnist"), torch.Generator().manual_seed(2000)
    x = torch.cat([generate(state, 1000, generator=g).x for _ in range(n // 1000)])
    path = WEIGHTS / "mnist.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["metrics"]["n_10000"] = {str(state.config.sample_steps): facts(x, real)}
    write_atomically(path, json.dumps(card, indent=1, ensure_ascii=False).encode() + b"\n")
    print(card["metrics"]["n_10000"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--n", type=int, default=2000, help="how many chains")
    parser.add_argument("--train-only", action="store_true", help="only see whether a seed diverges")
    parser.add_argument("--ablations", nargs="*", help="take choices away instead: all, or those named")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--store", action="store_true", help="write benchmarks/results/mnist_*.json")
    parser.add_argument("--ship", action="store_true", help="write the weights of the first seed into the package")
    parser.add_argument("--large", action="store_true", help="judge 10,000 samples of the shipped model instead")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.large:
        return judge_large(data()[1])
    device = resolve_device(args.device)
    seen, real = data()
    seen = seen.to(device)
    origin = about("mnist", seen)
    origin["machine"]["device"] = device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
    machine = {k: v for k, v in origin["machine"].items() if k != "threads"}  # a run's own business: see its row
    setting = {"recipe": dataclasses.asdict(RECIPE), "data": origin["data"], "machine": machine}
    print("| run | train s | steps | Fréchet | over floor | confident | smallest class | precision | recall |")
    print("|---|---|---|---|---|---|---|---|---|")
    if args.ablations is not None:
        for name in args.ablations or ABLATIONS:
            with tricks(SHORTER | ABLATIONS[name]) as settings:
                config = dataclasses.replace(RECIPE, **settings)
                row, _ = one_seed(config, seen, real, 500, 300, 5)
            show(name, row)
            if args.store:
                full = {**setting, "shorter": SHORTER}
                merge(RESULTS / "mnist_ablations.json", full, [{"name": name, "set": ABLATIONS[name], **row}], "name")
        return
    for seed in range(args.first, args.first + args.seeds):
        config = dataclasses.replace(RECIPE, seed=seed)
        row, state = one_seed(config, seen, real, 0 if args.train_only else args.n, 500)
        show(f"seed {seed}", row)
        if args.store:
            merge(RESULTS / "mnist_quality.json", setting, [row], "seed")
        if args.ship and seed == args.first and state is not None:
            shape = {"shape": [1, 28, 28], "width": config.width, "hidden": config.hidden}
            network = {"class": "EnergyCNN", **shape, "parameters": count_parameters(state.energy)}
            card = {"network": network, "seed": seed, "command": "python benchmarks/mnist_quality.py --ship"}
            card |= {"config": dataclasses.asdict(config), **origin}
            metrics = {k: row[k] for k in ("train_seconds", "rollbacks", "lengths")}
            ship("mnist", state.ema.module, card, metrics)


if __name__ == "__main__":
    main()
