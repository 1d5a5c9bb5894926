"""`ebm-lit evaluate`: one report for every kind of checkpoint, strict JSON, one picture, one-line errors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from ebm_lit import cli
from ebm_lit.cli import (
    EvaluationData,
    default_data,
    evaluate_run,
    evaluation_data,
    feature_maps,
    judge_copies,
    judge_samples,
    main,
)
from ebm_lit.data import digits, toy
from ebm_lit.training import TrainConfig, finish, generate, init_state, save_checkpoint, train

TINY = {"n_iterations": 3, "batch_size": 8, "n_steps": 2, "buffer_size": 32, "width": 8, "sample_steps": 4}


def evaluate(*args: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, args)])


def report(folder: Path) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "evaluation.json").read_text(), parse_constant=refuse)


def fails(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), result.output
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run on the digits."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    folder.mkdir()
    train(digits()[0], TrainConfig(**TINY, hidden=16), checkpoint=folder / "checkpoint.safetensors", progress=False)
    (folder / "config.json").write_text(json.dumps({"data": "digits", "shape": None, "config": {}}))
    return folder


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model of points."""
    path = tmp_path_factory.mktemp("points") / "moons.safetensors"
    config = TrainConfig(**TINY, step_size=0.02, noise_scale=0.2, bounds=None, init_range=(-4.0, 4.0), alpha=0.0)
    train(toy("moons").sample(500, torch.Generator().manual_seed(0)), config, checkpoint=path, progress=False)
    return path


def test_images(run, tmp_path):
    result = evaluate(run, "-n", 40, "--device", "cpu", "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-2:] == [str(tmp_path / "a" / f"evaluation.{end}") for end in ("json", "png")]
    found = report(tmp_path / "a")
    assert found["data"] == {"name": "digits", "n_real": 500, "held_out": True, "trained_on": True}
    assert found["n"] == 40 and found["iterations"] == 3
    assert found["quality"].keys() == {"32 principal components", "classifier of 10 classes"}
    for rows in found["quality"].values():
        assert rows.keys() == {"floor", "4 steps", "20 steps"}
        assert rows["floor"]["precision"] > 0.5 and rows["floor"]["frechet"] > 0
        row = rows["4 steps"]  # an untrained model: mush
        assert row["frechet_over_floor"] == pytest.approx(row["frechet"] / rows["floor"]["frechet"])
        assert row["frechet_over_floor"] > 2 and row["kernel_p"] == 1 / 500 and row["recall"] < 0.2
    assert found["copies"].keys() == {"4 steps", "20 steps"} and max(found["copies"].values()) < 0.2
    assert found["energy_over_temperature"].keys() == {"held-out data", "samples", "noise"}
    assert {"uniform noise", "inverted", "shifted", "photographs"} <= found["auroc"].keys()
    assert found["auroc"]["black"]["mean pixel"] == 1 and found["auroc"]["mirrored"]["mean pixel"] == pytest.approx(0.5)
    assert found["chains"]["n_chains"] == 16
    likelihood = found["likelihood"]["log-likelihood"]
    assert likelihood["stated"] or ("not stated, because" in result.output and likelihood["reason"])
    assert "certified" not in likelihood or not likelihood["certified"]  # nobody has exact samples of it
    with Image.open(tmp_path / "a" / "evaluation.png") as picture:
        assert min(picture.size) > 500
        assert len(np.unique(np.asarray(picture.convert("L")))) > 30  # something is drawn


def test_samples_are_judged_as_they_are_handed_out():
    """Chains walk on with their noise and are judged without it: at both lengths the samples are `finish` of chains."""
    x = digits()[0]
    state = train(x, TrainConfig(**TINY, hidden=16, denoise=True), progress=False)
    real = EvaluationData("digits", x, None, x[:60], held_out=False)
    g, again = (torch.Generator().manual_seed(3) for _ in range(2))
    seen = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli, "judge_samples", lambda samples, *_: seen.extend(samples.values()) or {})
        patched.setattr(cli, "evaluation_png", lambda *_: b"")
        evaluate_run(state, real, 20, 6, torch.Generator().manual_seed(0), g)
    chain = generate(state, 20, 6, again, finished=False).x
    later = state.config.sampler.sample(state.ema.module, chain, 24, again, ages=6)
    assert torch.equal(seen[0], finish(state, chain)) and torch.equal(seen[1], finish(state, later))
    assert not torch.equal(seen[0], chain)


def test_the_seed_decides(run, tmp_path):
    same = ["-n", 20, "--steps", 2, "--device", "cpu", "--out"]
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert evaluate(run / "checkpoint.safetensors", *same, tmp_path / out, "--seed", seed).exit_code == 0
    a, b, c = (report(tmp_path / out) for out in "abc")
    for found in (a, b, c):
        del found["seconds"], found["seed"]
    assert a == b and a != c


def test_points(points, tmp_path):
    result = evaluate(points, "--data", "moons", "-n", 50, "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = report(points.parent / "evaluation")
    assert found["quality"].keys() == {"coordinates"} and found["auroc"] == {}
    assert found["likelihood"]["log-likelihood"].keys() >= {"stated", "reason", "temperature"}
    assert (points.parent / "evaluation" / "evaluation.png").stat().st_size > 10_000


def test_a_folder_has_nothing_held_out(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (9, 12), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    result = evaluate(run, "--data", tmp_path / "pictures", "-n", 1000, "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "NOT held out" in result.output and "not the data" in result.output
    found = report(tmp_path / "out")
    assert found["n"] == 12 and not found["data"]["held_out"] and not found["data"]["trained_on"]
    assert found["copies"] is None and found["quality"].keys() == {"32 principal components"}
    for i in range(5, 24):
        (tmp_path / "pictures" / f"{i}.png").unlink()
    fails(evaluate(run, "--data", tmp_path / "pictures", "--device", "cpu"), "has 5 examples", "at least 20")


def test_mistakes_are_one_line(run, points, tmp_path):
    fails(evaluate(tmp_path / "nothing"), "no such file")
    (tmp_path / "note.txt").write_text("not a checkpoint")
    fails(evaluate(tmp_path / "note.txt"), "not a checkpoint")
    fails(evaluate(run, "--data", "no-such-data"), "--data must be digits", "'no-such-data'")
    fails(evaluate(run, "--data", "moons"), "--data must be", "'moons'")
    fails(evaluate(run, "--out", tmp_path / "note.txt"), "--out must be a folder")
    fails(evaluate(points), "nothing says what a model of shape (2,) was trained on", "--data")
    fails(evaluate(points, "--data", "digits"), "--data must name a toy", "moons")
    fails(evaluate(run, "--device", "nowhere"), "device must be")
    assert evaluate(run, "-n", 3).exit_code == 2
    assert not (run / "evaluation").exists()  # no mistake leaves anything behind


def test_a_chain_that_breaks_is_one_line(tmp_path):
    config = TrainConfig(**TINY, hidden=16, step_size=1e30, bounds=None)  # the first step overflows
    path = tmp_path / "broken.safetensors"
    save_checkpoint(init_state(config, digits()[0]), path)
    fails(evaluate(path, "--device", "cpu"), "NaN or infinite")


def test_default_data(run, tmp_path):
    assert default_data(run, (1, 8, 8)) == default_data(run / "checkpoint.safetensors", (1, 8, 8)) == "digits"
    assert default_data(tmp_path / "x.safetensors", (1, 8, 8)) == "digits"
    with pytest.raises(ValueError, match="give --data"):
        default_data(tmp_path / "x.safetensors", (3, 32, 32))


def test_data_are_held_out_and_shuffled():
    g = torch.Generator().manual_seed(0)
    data = evaluation_data("digits", (1, 8, 8), g)
    assert len(data.x_train) == 1297 and len(data.x_real) == 500 and data.held_out
    expected = digits("test")[0]
    assert not torch.equal(data.x_real, expected)
    assert torch.equal(data.x_real.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), the model takes \(1, 16, 16\)"):
        evaluation_data("digits", (1, 16, 16), g)


def test_judgements_of_known_samples():
    """Real digits sit at the floor, training digits are copies, noise is neither."""
    x, _ = digits("train")
    data = evaluation_data("digits", (1, 8, 8), torch.Generator().manual_seed(1))
    half = EvaluationData("digits", data.x_train, data.labels, data.x_real[:400], True)
    noise = 2 * torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(2)) - 1
    samples = {"real": data.x_real[400:], "copies": x[::12][:100], "noise": noise}
    for rows in judge_samples(samples, half, 100, torch.Generator().manual_seed(3)).values():
        assert rows["real"]["frechet_over_floor"] < 2 and rows["real"]["precision"] > 0.75
        assert rows["noise"]["frechet_over_floor"] > 5 and rows["noise"]["precision"] < 0.2
        assert rows["real"]["kernel_p"] > 1e-2 and rows["noise"]["kernel_p"] == 1 / 500
    copies = judge_copies(samples, half)
    assert copies["copies"] == 1 and abs(copies["real"] - 0.5) < 0.2 and copies["noise"] < 0.05


def test_features_have_unit_mean_square():
    data = evaluation_data("digits", (1, 8, 8), torch.Generator().manual_seed(4))
    for name, features in feature_maps(data).items():
        found = features(data.x_train)
        assert found.dtype == torch.float64 and found.shape[1] == 32, name
        assert math.isclose(float(found.square().mean()), 1, rel_tol=1e-6), name
