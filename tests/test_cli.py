"""The command line as users meet it: a subprocess with files, exit codes and one-line errors."""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from ebm_lit.cli import main
from ebm_lit.training import TrainConfig, load_checkpoint

TINY = ["--n-iterations", "12", "--batch-size", "16", "--n-steps", "3", "--buffer-size", "64", "--width", "8"]
TINY += ["--hidden", "16", "--sample-steps", "5", "--device", "cpu"]


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", "from ebm_lit.cli import main; main()", *map(str, args)]


def ebm_lit(*args: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `ebm-lit ARGS` without a terminal."""
    full = {**os.environ, **(env or {})}
    return subprocess.run(command(*args), cwd=cwd, env=full, capture_output=True, text=True, timeout=300, check=False)


def fails(result: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """It failed with one line that holds these words, and without a traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), result.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one tiny run on the digits was trained."""
    folder = tmp_path_factory.mktemp("home")
    result = ebm_lit("train", *TINY, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "trained 12 iterations" in result.stdout and "samples.png" in result.stdout
    assert result.stderr == ""  # no progress bar where there is no terminal
    return folder


def test_help_names_every_command_and_every_setting(tmp_path):
    top = ebm_lit("--help", cwd=tmp_path).stdout
    assert all(f"\n  {name} " in top for name in ("train", "sample", "energy", "info"))
    text = ebm_lit("train", "--help", cwd=tmp_path, env={"COLUMNS": "200"}).stdout
    for f in dataclasses.fields(TrainConfig):
        assert "--" + f.name.replace("_", "-") in text
    assert "Langevin steps per iteration" in text and "--debug" in text
    assert ebm_lit("--version", cwd=tmp_path).stdout.startswith("ebm-lit, version 0.")


def test_a_run_leaves_what_it_promises(home):
    run = home / "runs" / "digits"
    assert sorted(p.name for p in run.iterdir() if p.is_file()) == [
        ".checkpoint.safetensors.lock",
        "checkpoint.safetensors",
        "config.json",
        "history.csv",
        "samples.png",
    ]
    stored = json.loads((run / "config.json").read_text())
    assert stored["data"] == "digits" and TrainConfig.from_dict(stored["config"]).n_iterations == 12
    rows = list(csv.DictReader(io.StringIO((run / "history.csv").read_text())))
    assert [int(r["iteration"]) for r in rows] == list(range(12)) and all(np.isfinite(float(r["loss"])) for r in rows)
    with Image.open(run / "samples.png") as image:
        assert min(image.size) > 100
    assert load_checkpoint(run / "checkpoint.safetensors").step == 12


def test_sample_writes_pictures_and_tensors_reproducibly(home, tmp_path):
    for out in ("a", "b"):
        result = ebm_lit("sample", "runs/digits", "-n", 9, "--steps", 7, "--seed", 3, "--out", tmp_path / out, cwd=home)
        assert result.returncode == 0, result.stderr
    assert "9 samples" in result.stdout and "7 steps" in result.stdout
    a, b = (load_file(tmp_path / out / "samples.safetensors") for out in ("a", "b"))
    assert a["samples"].shape == (9, 1, 8, 8) and a["energies"].shape == (9,)
    assert all(torch.equal(a[k], b[k]) for k in a)
    for name in ("samples.png", "filmstrip.png"):
        with Image.open(tmp_path / "a" / name) as image:
            assert min(image.size) > 50


def test_energy_of_images(home, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "noise.png")
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "colour.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    good = ebm_lit("energy", home / "runs" / "digits", "noise.png", "colour.jpg", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    rows = list(csv.DictReader(io.StringIO(good.stdout)))
    assert [r["image"] for r in rows] == ["noise.png", "colour.jpg"]
    assert all(np.isfinite(float(r["energy"])) for r in rows)
    mixed = ebm_lit("energy", home / "runs" / "digits", "broken.png", "noise.png", cwd=tmp_path)
    fails(mixed, "broken.png")
    assert list(csv.DictReader(io.StringIO(mixed.stdout))) == rows[:1]  # the good one is still answered


def test_info(home):
    text = ebm_lit("info", "runs/digits/checkpoint.safetensors", cwd=home)
    assert text.returncode == 0 and "EnergyCNN" in text.stdout and "12 of 12" in text.stdout
    facts = json.loads(ebm_lit("info", "runs/digits", "--json", cwd=home).stdout)
    assert facts["config"]["width"] == 8 and facts["shape"] == [1, 8, 8]


def test_config_file_options_and_their_order(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"width": 8, "hidden": 16, "n_iterations": 2, "n_steps": 2}))
    more = ["--n-steps", 1, "--buffer-size", 32, "--batch-size", 8, "--sample-steps", 2, "--grad-clip", "none"]
    more += ["--bounds", "-1,1", "--device", "cpu", "--seed", 7]
    result = ebm_lit("train", "--config", "c.json", *more, "--name", "x", "--runs", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = load_checkpoint(tmp_path / "out" / "x" / "checkpoint.safetensors").config
    assert (config.width, config.n_steps, config.seed, config.grad_clip) == (8, 1, 7, None)
    assert config.bounds == (-1.0, 1.0)


def test_a_folder_of_images(tmp_path):
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    result = ebm_lit("train", "--data", "pictures", *TINY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path / "runs" / "pictures" / "checkpoint.safetensors").shape == (3, 9, 12)


def in_process(*args: object) -> subprocess.CompletedProcess[str]:
    """The same command without a new interpreter, for the many mistakes below."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    return subprocess.CompletedProcess(args, result.exit_code, result.stdout, result.stderr)


def test_mistakes_are_one_line(home, tmp_path, monkeypatch):
    fails(ebm_lit("train", *TINY, cwd=home), "already holds a run", "--resume")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"speed": 1}')
    fails(in_process("train", "--step-size", "-1"), "step_size")
    fails(in_process("train", "--data", "nothing-here"), "folder of images", "nothing-here")
    fails(in_process("train", "--data", "empty"), "empty")
    fails(in_process("train", "--config", "bad.json"), "bad.json", "JSON")
    fails(in_process("train", "--config", "odd.json"), "speed")
    fails(in_process("train", "--device", "abacus"), "abacus")
    fails(in_process("train", "--resume", "nowhere"), "nowhere")
    fails(in_process("train", "--resume", home / "runs" / "digits", "--seed", 1), "--resume")
    fails(in_process("info", "nowhere"), "no such file")
    fails(in_process("sample", "bad.json"), "not a checkpoint")
    assert not (tmp_path / "runs").exists()
    assert in_process("train", "--no-such-option").returncode == 2
    shown = ebm_lit("info", "nowhere", "--debug", cwd=tmp_path)
    assert shown.returncode != 0 and "Traceback" in shown.stderr


def test_no_network_and_no_data(tmp_path):
    dead = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    result = ebm_lit("train", "--data", "mnist", cwd=tmp_path, env={"EBM_LIT_DATA": str(tmp_path / "none"), **dead})
    fails(result, "EBM_LIT_DATA")


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process")
def test_ctrl_c_saves_and_resume_continues_bit_for_bit(tmp_path):
    long = [*TINY, "--n-iterations", "2000", "--n-steps", "1"]
    process = subprocess.Popen(
        command("train", *long), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "images of shape" in process.stdout.readline()
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert "continue with: ebm-lit train --resume" in out and "Traceback" not in err
    checkpoint = tmp_path / "runs" / "digits" / "checkpoint.safetensors"
    assert 0 < load_checkpoint(checkpoint).step < 2000
    assert ebm_lit("train", "--resume", "runs/digits", cwd=tmp_path).returncode == 0
    assert ebm_lit("train", *long, "--name", "straight", cwd=tmp_path).returncode == 0
    a, b = (load_file(tmp_path / "runs" / name / "checkpoint.safetensors") for name in ("digits", "straight"))
    assert a.keys() == b.keys() and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)
