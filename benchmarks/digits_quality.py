"""Quality of the default digits run: train from several seeds, judge 500 samples from uniform noise.

    python benchmarks/digits_quality.py                     ten seeds, table on standard output
    python benchmarks/digits_quality.py --seeds 3 --store   and write benchmarks/results/digits_quality.json

The judge is a classifier from scikit-learn that never sees a sample; the floor of every number is what 500 held-out
digits get from the same judge.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from sklearn.neural_network import MLPClassifier

from ebm_lit import TrainConfig, __version__, digits, generate, train
from ebm_lit.training import DivergenceError, resolve_device

RESULTS = Path(__file__).resolve().parent / "results" / "digits_quality.json"


class Judge:
    """An independent classifier: confidence, classes, Fréchet distance in its features, nearest neighbours."""

    def __init__(self) -> None:
        (x, y), (x_test, y_test) = digits("train"), digits("test")
        self.x, self.x_test = x.flatten(1).numpy(), x_test.flatten(1).numpy()
        self.net = MLPClassifier((256, 64), alpha=1e-3, max_iter=300, random_state=0).fit(self.x, y.numpy())
        self.accuracy = float(self.net.score(self.x_test, y_test.numpy()))
        self.floor = self.frechet(self.x_test)

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


def one_seed(seed: int, judge: Judge, lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Train with the default configuration and judge chains of several lengths."""
    config = TrainConfig(seed=seed)
    began = time.perf_counter()
    try:
        state = train(digits("train")[0].to(device), config, progress=False)
    except DivergenceError as error:
        return {"seed": seed, "diverged": str(error)}
    row: dict[str, Any] = {"seed": seed, "train_seconds": time.perf_counter() - began}
    for n_steps in (config.sample_steps, *lengths):
        generator = torch.Generator(device).manual_seed(1000 + seed)
        x = generate(state, 500, n_steps, generator=generator).x
        row[str(n_steps)] = judge(x.flatten(1).cpu().numpy())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds, from 0 on")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1000, 4000], help="further chain lengths to judge")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="8×8 images are too small to share among cores")
    parser.add_argument("--store", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judge = Judge()
    real = judge(judge.x_test)
    print(f"judge: test accuracy {judge.accuracy:.3f}; held-out digits: {real['confident']:.3f} confident,", end=" ")
    print(f"Fréchet floor {judge.floor:.2f}, nearest training image {real['nearest_median']:.2f} (median)", flush=True)
    print("| seed | train s | steps | confident | smallest class | Fréchet / floor | nearest (median) |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for seed in range(args.seeds):
        row = one_seed(seed, judge, tuple(args.lengths), resolve_device(args.device))
        rows.append(row)
        for steps, q in ((k, v) for k, v in row.items() if k.isdigit()):
            print(
                f"| {seed} | {row['train_seconds']:.0f} | {steps} | {q['confident']:.3f} | {q['smallest_class']:.3f} "
                f"| {q['frechet_over_floor']:.2f} | {q['nearest_median']:.2f} |",
                flush=True,
            )
        if "diverged" in row:
            print(f"| {seed} | diverged: {row['diverged']} |", flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ebm_lit": __version__}
    if args.store:
        RESULTS.parent.mkdir(exist_ok=True)
        facts = {"machine": machine, "versions": versions, "device": args.device, "cores": os.cpu_count()}
        judged = {"accuracy": judge.accuracy, "floor": judge.floor, "held_out": real}
        RESULTS.write_text(json.dumps({**facts, "judge": judged, "runs": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
