"""Quality of the default digits run: train from several seeds, judge 500 samples from uniform noise.

    python benchmarks/digits_quality.py                     ten seeds, table on standard output
    python benchmarks/digits_quality.py --store             and write benchmarks/results/digits_quality.json
    python benchmarks/digits_quality.py --ship              seed 0 into the package, with its card
    python benchmarks/digits_quality.py --reinit-age 30     the same for chains that restart by age
    python benchmarks/digits_quality.py --diverged --store  of twenty seeds, how many diverge? results/digits_seeds.json

The judge is a classifier from scikit-learn that never sees a sample. The Fréchet distance has two floors, both of 500
real digits against the other 1,297: the held-out digits of the library's split, in which every class has the same share
as in the reference (no independent sample is that even), and five random splits, each with a judge of its own, in which
the shares fluctuate as they do in 500 independent draws.
"""

import argparse
import dataclasses
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from shipping import about, ship
from sklearn.neural_network import MLPClassifier

from ebm_lit import TrainConfig, __version__, digits, generate, train
from ebm_lit.energy import count_parameters
from ebm_lit.training import DivergenceError, resolve_device

RESULTS = Path(__file__).resolve().parent / "results"


class Judge:
    """An independent classifier, fitted to `x`: confidence, classes, Fréchet distance to `x` in its features."""

    def __init__(self, x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> None:
        self.x, self.x_test = x, x_test
        self.net = MLPClassifier((256, 64), alpha=1e-3, max_iter=300, random_state=0).fit(x, y)
        self.accuracy = float(self.net.score(x_test, y_test))
        self.floor = self.frechet(x_test)

    def features(self, x: np.ndarray) -> np.ndarray:
        """The 64 activations before the classifier's last layer."""
        for weight, bias in zip(self.net.coefs_[:-1], self.net.intercepts_[:-1], strict=True):
            x = np.maximum(x @ weight + bias, 0)
        return x

    def frechet(self, x: np.ndarray) -> float:
        """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) between the features of `x` and of the training digits."""
        a, b = self.features(x), self.features(self.x)
        gap, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
        roots = np.sqrt(np.maximum(scipy.linalg.eigvals(cov_a @ cov_b).real, 0))
        return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())

    def __call__(self, x: np.ndarray) -> dict[str, Any]:
        p = self.net.predict_proba(x)
        share = np.bincount(p.argmax(1), minlength=10) / len(x)
        nearest = np.sqrt(((x[:, None] - self.x[None]) ** 2).sum(-1)).min(1)
        return {
            "confident": float((p.max(1) >= 0.9).mean()),
            "smallest_class": float(share.min()),
            "largest_class": float(share.max()),
            "frechet": self.frechet(x),
            "frechet_over_floor": self.frechet(x) / self.floor,
            "nearest_median": float(np.median(nearest)),
            "nearest_5_percent": float(np.quantile(nearest, 0.05)),
        }


def judges(n_random: int = 5) -> list[Judge]:
    """One judge for the library's balanced split, then one for each of `n_random` random splits of the same sizes."""
    splits = [digits("train"), digits("test")]
    (x, y), (x_test, y_test) = [(images.flatten(1).numpy(), labels.numpy()) for images, labels in splits]
    found = [Judge(x, y, x_test, y_test)]
    x_all, y_all, rng = np.concatenate([x, x_test]), np.concatenate([y, y_test]), np.random.default_rng(0)
    for _ in range(n_random):
        order = rng.permutation(len(x_all))
        a, b = order[: len(x)], order[len(x) :]
        found.append(Judge(x_all[a], y_all[a], x_all[b], y_all[b]))
    return found


def judged(x: np.ndarray, panel: list[Judge]) -> dict[str, float]:
    """What the first judge says, and the mean ratio to the random splits' floors."""
    ratios = [judge.frechet(x) / judge.floor for judge in panel[1:]]
    return {**panel[0](x), "frechet_over_random_floor": float(np.mean(ratios)) if ratios else math.nan}


def one_seed(config: TrainConfig, panel: list[Judge], lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Train with one configuration and judge chains of several lengths."""
    seed = config.seed
    began = time.perf_counter()
    try:
        state = train(digits("train")[0].to(device), config, progress=False)
    except DivergenceError as error:
        return {"seed": seed, "diverged": str(error)}
    row: dict[str, Any] = {"seed": seed, "train_seconds": time.perf_counter() - began}
    for n_steps in (config.sample_steps, *lengths):
        generator = torch.Generator(device).manual_seed(1000 + seed)
        x = generate(state, 500, n_steps, generator=generator).x
        row[str(n_steps)] = judged(x.flatten(1).cpu().numpy(), panel)
    return row


def count_diverged(seeds: range, store: bool) -> None:
    """Train with the default configuration from every seed; with `store`, each row is kept at once."""
    path, panel = RESULTS / "digits_seeds.json", judges(0)
    for seed in seeds:
        row = one_seed(TrainConfig(seed=seed), panel, (), torch.device("cpu"))
        print(json.dumps(row), flush=True)
        if store:
            known = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
            rows = sorted([r for r in known if r["seed"] != seed] + [row], key=lambda r: r["seed"])
            versions = {"python": platform.python_version(), "torch": torch.__version__, "ebm_lit": __version__}
            text = json.dumps({"versions": versions, "runs": rows}, indent=1).replace("NaN", "null") + "\n"
            path.write_text(text, encoding="utf-8")


def ship_default() -> None:
    """Train seed 0 of the default configuration and write it into the package, with its card."""
    config, x, panel, began = TrainConfig(), digits("train")[0], judges(), time.perf_counter()
    state = train(x, config, progress=False)
    seconds, lengths = round(time.perf_counter() - began, 1), {}
    for n_steps in (config.sample_steps, 10 * config.sample_steps):
        samples = generate(state, 500, n_steps, generator=torch.Generator().manual_seed(1000)).x
        lengths[str(n_steps)] = {k: round(v, 4) for k, v in judged(samples.flatten(1).numpy(), panel).items()}
    shape = {"shape": list(state.shape), "width": config.width, "hidden": config.hidden}
    network = {"class": "EnergyCNN", **shape, "parameters": count_parameters(state.energy)}
    card = {"network": network, "seed": 0, "command": "python benchmarks/digits_quality.py --ship"}
    card |= {"config": dataclasses.asdict(config), **about("digits", x)}
    ship("digits", state.ema.module, card, {"train_seconds": seconds, "lengths": lengths})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="how many seeds: 10, or 20 with --diverged")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--diverged", action="store_true", help="only train, and judge the nominal chain length")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1000, 4000], help="further chain lengths to judge")
    parser.add_argument("--reinit-age", type=float, help="restart chains by age instead of by one probability")
    parser.add_argument("--steps", type=int, help="nominal chain length, if not the configuration's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="8×8 images are too small to share among cores")
    parser.add_argument("--store", action="store_true", help="write benchmarks/results/digits_quality*.json")
    parser.add_argument("--ship", action="store_true", help="write seed 0 and its card into the package instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.ship:
        return ship_default()
    seeds = range(args.first, args.first + (args.seeds or (20 if args.diverged else 10)))
    if args.diverged:
        return count_diverged(seeds, args.store)
    settings = {"reinit_age": args.reinit_age} | ({"sample_steps": args.steps} if args.steps else {})
    panel = judges()
    judge, real = panel[0], panel[0](panel[0].x_test)
    print(f"judge: test accuracy {judge.accuracy:.3f}; held-out digits: {real['confident']:.3f} confident,", end=" ")
    floors = ", ".join(f"{j.floor:.2f}" for j in panel[1:])
    print(f"Fréchet floor {judge.floor:.2f}, of random splits {floors};", end=" ")
    print(f"nearest training image {real['nearest_median']:.2f} (median)", flush=True)
    print("| seed | train s | steps | confident | smallest class | Fréchet/balanced | Fréchet/random | nearest |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for seed in seeds:
        config = TrainConfig(seed=seed, **settings)
        row = one_seed(config, panel, tuple(args.lengths), resolve_device(args.device))
        rows.append(row)
        for steps, q in ((k, v) for k, v in row.items() if k.isdigit()):
            print(
                f"| {seed} | {row['train_seconds']:.0f} | {steps} | {q['confident']:.3f} | {q['smallest_class']:.3f} "
                f"| {q['frechet_over_floor']:.2f} | {q['frechet_over_random_floor']:.2f} | {q['nearest_median']:.2f} |",
                flush=True,
            )
        if "diverged" in row:
            print(f"| {seed} | diverged: {row['diverged']} |", flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ebm_lit": __version__}
    if args.store:
        RESULTS.mkdir(exist_ok=True)
        suffix = "" if args.reinit_age is None else f"_reinit_age_{args.reinit_age:g}"
        facts = {"machine": machine, "versions": versions, "device": args.device, "settings": settings}
        floors = {"floor": judge.floor, "random_floors": [j.floor for j in panel[1:]]}
        about = {"accuracy": judge.accuracy, **floors, "held_out": real}
        text = json.dumps({**facts, "judge": about, "runs": rows}, indent=1) + "\n"
        (RESULTS / f"digits_quality{suffix}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
