"""The promises about the default digits run, kept by full-size training: several minutes, hence `slow`."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def test_none_of_twenty_stored_seeds_diverged() -> None:
    """Written by `python benchmarks/digits_quality.py --diverged --store`: the default recipe, twenty seeds."""
    runs = json.loads((BENCHMARKS / "results" / "digits_seeds.json").read_text(encoding="utf-8"))["runs"]
    assert [row["seed"] for row in runs] == list(range(20))
    assert [row for row in runs if "diverged" in row] == []
    assert all(row["200"]["confident"] > 0.8 for row in runs), "and each of them learned to draw digits"


@pytest.mark.slow
def test_ten_seeds_of_the_digits_run() -> None:
    """No seed diverges, and the worst of ten meets every bar at the nominal chain length."""
    from digits_quality import judges, one_seed

    from ebm_lit import TrainConfig

    panel = judges()
    judge = panel[0]
    assert judge.accuracy >= 0.97
    held_out = judge(judge.x_test)
    rows = [one_seed(TrainConfig(seed=seed), panel, (), torch.device("cpu")) for seed in range(10)]
    assert [row for row in rows if "diverged" in row] == []
    for row in rows:
        quality = next(v for k, v in row.items() if k.isdigit())
        assert quality["confident"] >= 0.9, row
        assert quality["smallest_class"] >= 0.04, row
        assert quality["frechet_over_random_floor"] <= 4, row
        # not copies: the closest 5 % of the samples lie no nearer to training images than half of what new digits do
        assert quality["nearest_5_percent"] >= held_out["nearest_5_percent"] / 2, row
