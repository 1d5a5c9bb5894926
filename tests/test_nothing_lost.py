"""Nothing lost: `kill -9`, diverging runs, disks that refuse, and two processes on one run."""

import dataclasses
import errno
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from ebm_lit import cli, training
from ebm_lit.cli import main
from ebm_lit.data import digits
from ebm_lit.training import (
    CheckpointError,
    DivergenceError,
    Rollback,
    TrainConfig,
    init_state,
    load_checkpoint,
    lock_checkpoint,
    read_checkpoint,
    save_checkpoint,
    train,
    train_step,
    write_atomically,
)

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX processes and signals")
TINY = TrainConfig(n_iterations=24, batch_size=16, n_steps=3, buffer_size=64, width=8, hidden=16, sample_steps=5)
TINY = dataclasses.replace(TINY, monitor_every=4)
CALM = 1e29  # a threshold that nothing reaches
# With this learning rate the tiny run leaves every reasonable range at once; a thousandth of it is fine.
WILD = dataclasses.replace(TINY, learning_rate=3.0, warmup=0, alpha=0.0, rollback_factor=1e-3)
PROVOKED = {
    "gap": ("energy gap", dataclasses.replace(WILD, max_grad_norm=CALM)),
    "gradient": ("gradient norm", dataclasses.replace(WILD, max_energy_gap=CALM)),
    "saturation": ("saturated", dataclasses.replace(WILD, max_energy_gap=CALM, max_grad_norm=CALM, max_saturation=0.9)),
    "finite": ("non-finite", dataclasses.replace(WILD, learning_rate=1e25, rollback_factor=1e-28)),
}
LATE = dataclasses.replace(WILD, warmup=200)  # the rate rises until the run leaves the range halfway


@pytest.fixture(scope="module")
def x() -> Tensor:
    return digits("train")[0]


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `samples.png` looks like is tested elsewhere."""
    monkeypatch.setattr(cli, "grid_png", lambda x, n_cols=None: x.numpy().tobytes())


def rolling(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, on_divergence="rollback", **changes)


def differing(a: training.TrainState, b: training.TrainState) -> list[str]:
    """Names of everything in which two runs differ in any bit."""
    left, right = training._tensors(a), training._tensors(b)
    names = [k for k in left.keys() | right.keys() if k not in left or k not in right]
    both = left.keys() & right.keys()
    names += [k for k in both if left[k].detach().numpy().tobytes() != right[k].detach().numpy().tobytes()]
    return names + [f for f in ("step", "config", "rollbacks", "data_hash") if getattr(a, f) != getattr(b, f)]


def stop_after(n: int) -> Callable[[], bool]:
    calls = iter(range(1, 10_000))
    return lambda: next(calls) == n


# --- kill -9 --------------------------------------------------------------------------------------------------------
#
# One process imports PyTorch once and forks a child for every command, so that a kill costs a fraction of a second. A
# child runs the real `ebm-lit train`; only the drawing of `samples.png` is replaced by something quick.

SETTINGS = ["--device", "cpu", "--checkpoint-every", "2"]
for _name in (
    "n_iterations",
    "batch_size",
    "n_steps",
    "buffer_size",
    "width",
    "hidden",
    "sample_steps",
    "monitor_every",
):
    SETTINGS += ["--" + _name.replace("_", "-"), str(getattr(TINY, _name))]
PLAIN = [*SETTINGS, "--n-iterations", "40"]
ROLLING = [*PLAIN, "--on-divergence", "rollback", "--learning-rate", "3", "--warmup", "400", "--alpha", "0"]
ROLLING += ["--rollback-factor", "1e-3"]
STAGES = ("opening", "half written", "not flushed", "not renamed", "renamed")
FILES = ["checkpoint.safetensors", "config.json", "history.csv", "samples.png"]


class Saves:
    """Shared memory in which a child says whether it is saving, and the number of its saves."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 2)
        self.real = training.write_atomically

    def clear(self) -> None:
        self.memory[:] = b"\0\0"

    def __call__(self, path: str | Path, content: bytes) -> None:
        self.memory[0], self.memory[1] = 1, self.memory[1] + 1
        self.real(path, content)
        self.memory[0] = 0

    def die_at(self, number: int, stage: str) -> None:
        """In a child: arrange to be killed at a stage of the save with this number."""
        fsync, replace, opened = os.fsync, os.replace, Path.open

        def due(now: str) -> bool:
            return self.memory[1] == number and stage == now

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def dying_fsync(file: int) -> None:
            if due("not flushed"):
                die()
            fsync(file)

        def dying_replace(source: Path, target: Path) -> None:
            if due("not renamed"):
                die()
            replace(source, target)
            if due("renamed"):
                die()

        def dying_open(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path.suffix == ".part" and due("opening"):
                die()
            file = opened(path, *args, **kwargs)
            if path.suffix == ".part" and due("half written"):
                content = b"half of a file"
                file.write(content)
                file.flush()
                die()
            return file

        os.fsync, os.replace, Path.open = dying_fsync, dying_replace, dying_open  # type: ignore[assignment]


def start(words: list[str], said: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a child that runs `ebm-lit WORDS`; returns its process id."""
    if pid := os.fork():
        return pid
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    prepare()
    try:
        main(words)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    os._exit(99)


def finish(pid: int) -> int:
    """Exit code of a child, or −9."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Torturer:
    """Kills runs, resumes them, and compares what they leave with a run that nobody disturbed."""

    def __init__(self, home: Path, seed: int):
        torch.set_num_threads(1)
        data, weight = digits("train"), torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.zeros(1)
        torch.optim.Adam([weight]).step()  # what PyTorch imports at the first update, it imports here, and once
        cli.DATASETS["digits"] = lambda: data
        cli.grid_png = lambda x, n_cols=None: x.numpy().tobytes()
        self.saves, self.rng, self.home, self.said = Saves(), random.Random(seed), home, home / "said.txt"
        training.write_atomically = cli.write_atomically = self.saves
        self.expected: dict[str, tuple[dict[str, bytes], float, int]] = {}

    def undisturbed(self, name: str, words: list[str]) -> tuple[dict[str, bytes], float, int]:
        """The files, the seconds and the number of saves of a run that is left alone."""
        if name not in self.expected:
            self.saves.clear()
            began = time.perf_counter()
            code = finish(start(["train", *words, "--runs", str(self.home), "--name", name], self.said))
            assert code == 0, self.said.read_text()
            seconds = time.perf_counter() - began
            self.expected[name] = self.content(self.home / name), seconds, self.saves.memory[1]
        return self.expected[name]

    def content(self, folder: Path) -> dict[str, bytes]:
        names = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))
        return {name: (folder / name).read_bytes() for name in names}

    def kill(self, words: list[str], seconds: float, saves: int, timed: bool) -> dict[str, Any]:
        """Start a command and kill it at a random moment, or at a random stage of a random save."""
        self.saves.clear()
        if timed:
            wait, pid = self.rng.uniform(0, seconds), start(words, self.said)
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
            moment = f"after {wait:.2f} s"
        else:
            number, stage = self.rng.randint(1, saves), self.rng.choice(STAGES)
            pid = start(words, self.said, lambda: self.saves.die_at(number, stage))
            moment = f"save {number}, {stage}"
        code = finish(pid)
        return {"moment": moment, "killed": code == -signal.SIGKILL, "saving": bool(self.saves.memory[0])}

    def case(self, i: int) -> dict[str, Any]:
        """One run: killed once (every third one twice), resumed, compared."""
        name, words = (("plain", PLAIN), ("rolling", ROLLING))[i % 2]
        expected, seconds, saves = self.undisturbed(name, words)
        folder = self.home / f"{i}" / name
        begin = ["train", *words, "--runs", str(folder.parent), "--name", name]
        resume = ["train", "--resume", str(folder), *SETTINGS[:4]]
        fact = self.kill(begin, seconds, saves, timed=i % 4 < 2)
        fact["begun"] = (folder / "config.json").exists()
        code = 0
        if i % 3 == 2:
            fact["again"] = self.kill(resume, seconds, saves, timed=True)["moment"]
        if (folder / "config.json").exists():
            fact["step"] = load_checkpoint(folder / FILES[0]).step if (folder / FILES[0]).exists() else None
            fact["leftovers"] = sum(p.suffix == ".part" for p in folder.iterdir())
            code = finish(start(resume, self.said))
        else:  # nothing had begun: resuming says so, and starting again works
            code = finish(start(resume, self.said))
            fact["refusal"] = self.said.read_text()
            assert code == 1, fact
            code = finish(start(begin, self.said))
        fact["rollbacks"] = len(load_checkpoint(folder / FILES[0]).rollbacks)
        content = self.content(folder)
        fact["differing"] = [k for k in expected.keys() | content.keys() if expected.get(k) != content.get(k)]
        return fact | {"code": code, "said": self.said.read_text()}

    def two_at_once(self) -> dict[str, Any]:
        """A second process on a folder in use is refused; once the first one is killed, the folder is free."""
        folder = self.home / "busy"
        long = ["train", *PLAIN, "--n-iterations", "1000000", "--runs", str(self.home), "--name", "busy"]
        first = start(long, self.said)
        other = self.home / "other.txt"
        while not (folder / "history.csv").exists() and not (folder / FILES[0]).exists():
            time.sleep(0.01)
        os.kill(first, signal.SIGSTOP)  # it holds the lock and leaves the files alone
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        refused = [finish(start(["train", "--resume", str(folder)], other))]
        said = [other.read_text()]
        refused.append(finish(start([*long, "--seed", "1"], other)))
        said.append(other.read_text())
        same = before == {p.name: p.read_bytes() for p in folder.iterdir()}
        os.kill(first, signal.SIGKILL)
        finish(first)
        second = start(["train", "--resume", str(folder)], other)
        while "iteration" not in other.read_text() and "images of shape" not in other.read_text():
            time.sleep(0.01)
        os.kill(second, signal.SIGKILL)
        finish(second)
        return {"refused": refused, "said": said, "same": same, "after": other.read_text()}


def torture(home: Path, what: str, n: int, seed: int) -> Iterator[dict[str, Any]]:
    """Start the process that kills; its findings, one by one."""
    process = subprocess.run(
        [sys.executable, __file__, str(home), what, str(n), str(seed)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return map(json.loads, process.stdout.splitlines())


def check_kills(facts: list[dict[str, Any]], n: int) -> None:
    assert len(facts) == n and {fact["rollbacks"] > 0 for fact in facts} == {False, True}
    for fact in facts:
        assert fact["code"] == 0 and fact["differing"] == [], fact
        if not fact["begun"] and "again" not in fact:
            assert "no run to resume" in fact["refusal"] and "Traceback" not in fact["refusal"], fact
    assert sum(fact["killed"] for fact in facts) >= 0.8 * n  # a timed kill may come after the end
    assert sum(fact["killed"] and fact["saving"] for fact in facts) >= 0.4 * n, facts  # every second one aims at a save


@posix
def test_kill_9_and_resume_ends_with_the_same_bits(tmp_path: Path) -> None:
    check_kills(list(torture(tmp_path, "kill", 10, seed=0)), 10)


@posix
@pytest.mark.slow
def test_kill_9_thirty_times(tmp_path: Path) -> None:
    facts = list(torture(tmp_path, "kill", 30, seed=1))
    for fact in facts:
        print(json.dumps({k: v for k, v in fact.items() if k not in ("said", "refusal")}))
    check_kills(facts, 30)


@posix
def test_second_process_is_refused_and_a_killed_one_frees_the_folder(tmp_path: Path) -> None:
    fact = next(torture(tmp_path, "lock", 1, seed=0))
    assert fact["refused"] == [1, 1] and fact["same"], fact
    assert "another process is training here" in fact["said"][0]
    assert "already holds a run" in fact["said"][1]
    assert all(said.count("\n") == 1 and "Traceback" not in said for said in fact["said"])
    assert "Error" not in fact["after"]


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(
    tmp_path: Path, quick_pictures: None
) -> None:
    run = ["train", *SETTINGS, "--runs", str(tmp_path)]
    assert CliRunner().invoke(main, [*run, "--name", "whole"]).exit_code == 0
    assert CliRunner().invoke(main, [*run, "--name", "part"]).exit_code == 0
    part, whole = tmp_path / "part", tmp_path / "whole"
    expected = (whole / FILES[0]).read_bytes()
    (part / FILES[0]).unlink()
    refused = CliRunner().invoke(main, ["train", "--resume", str(part)])
    assert refused.exit_code == 1 and "no run to resume" in refused.stderr  # the checkpoint was lost, not unwritten
    (part / "history.csv").unlink()
    (part / ".checkpoint.safetensors.123.part").write_bytes(b"half")
    result = CliRunner().invoke(main, ["train", "--resume", str(part), "--checkpoint-every", "2"])
    assert result.exit_code == 0 and "no checkpoint yet: starting from the beginning" in result.stdout
    assert (part / FILES[0]).read_bytes() == expected
    assert not list(part.glob(".*.part"))


def test_an_empty_folder_of_a_killed_run_is_free(tmp_path: Path, quick_pictures: None) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / ".checkpoint.safetensors.lock").touch()
    (folder / ".config.json.77.part").write_bytes(b"{")
    refused = CliRunner().invoke(main, ["train", "--resume", str(folder)])
    assert refused.exit_code == 1 and "no run to resume" in refused.stderr
    assert CliRunner().invoke(main, ["train", *SETTINGS, "--runs", str(tmp_path)]).exit_code == 0
    assert sorted(p.name for p in folder.iterdir()) == [".checkpoint.safetensors.lock", *FILES]


# --- divergence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROVOKED)
def test_every_monitor_stops_the_run(x: Tensor, kind: str) -> None:
    signal_, config = PROVOKED[kind]
    with pytest.raises(DivergenceError, match=r"at iteration \d+: .*; try ") as caught:
        train(x, config, progress=False)
    assert caught.value.signal.startswith(signal_) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PROVOKED)
def test_every_monitor_rolls_the_run_back(x: Tensor, kind: str) -> None:
    signal_, config = PROVOKED[kind]
    state = train(x, rolling(config), progress=False)
    assert state.step == 24 and state.history.isfinite().all()
    first = state.rollbacks[0]
    assert first.signal.startswith(signal_) and first.back_to <= first.step
    rate = state.metrics["learning_rate"]
    plain = torch.tensor([training.learning_rate(config, i) for i in range(24)])
    assert rate[-2] == pytest.approx(float(plain[-2]) * state.rollbacks[-1].factor, rel=1e-5)
    assert state.config.learning_rate == pytest.approx(config.learning_rate * state.rollbacks[-1].factor)
    assert state.rollbacks[-1].factor == pytest.approx(config.rollback_factor ** len(state.rollbacks))


@pytest.mark.parametrize("kind", PROVOKED)
def test_rollbacks_run_out(x: Tensor, kind: str) -> None:
    """A factor of 1 never calms anything: the error comes after as many rollbacks as were allowed."""
    signal_, config = PROVOKED[kind]
    state = init_state(rolling(config, rollback_factor=1.0, max_rollbacks=2), x)
    with pytest.raises(DivergenceError, match=r"\(after 2 rollbacks\); try ") as caught:
        train(x, state=state, progress=False)
    assert caught.value.signal.startswith(signal_) and len(state.rollbacks) == 2


def test_a_rollback_restores_everything_but_the_noise(x: Tensor) -> None:
    config = rolling(TINY, rollback_factor=0.25)
    state, twin = (train(x, config, progress=False, stop=stop_after(10)) for _ in range(2))
    assert [saved.header["step"] for saved in state.good] == [4, 8]
    then = train(x, config, progress=False, stop=stop_after(4))
    with torch.no_grad():
        for tensor in training._tensors(state).values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 3)
    for run in (state, twin):
        training.roll_back(run, DivergenceError("a fault", 9, "injected", "nothing"))
    assert set(differing(state, then)) == {"generator", "config", "rollbacks"}
    assert differing(state, twin) == []  # the same noise whenever the same run is repeated
    assert state.rollbacks == [Rollback("a fault", 9, 4, 0.25)] and state.step == 4
    assert state.config == dataclasses.replace(config, learning_rate=config.learning_rate / 4)
    for run in (state, then):
        train_step(run, x)
    assert not torch.equal(state.buffer.samples, then.buffer.samples)
    training.roll_back(state, DivergenceError("a fault", 5, "injected", "nothing"))  # the copies were not touched
    assert {"generator", "history"} & set(differing(twin, state)) == {"generator"} and state.step == 4


def test_a_passing_fault_is_survived(x: Tensor) -> None:
    """NaN in a weight, once: the run goes back to a state that had stood the test of a whole stretch."""
    faults = iter([13])

    def poison(state: training.TrainState) -> None:
        nonlocal due
        if state.step == due:
            due = next(faults, -1)
            with torch.no_grad():
                next(state.energy.parameters()).view(-1)[0] = float("nan")

    due = next(faults)
    state = train(x, rolling(TINY), progress=False, callbacks=[poison], callback_every=1)
    assert state.step == 24 and state.history.isfinite().all()
    assert [(r.step, r.back_to, r.factor) for r in state.rollbacks] == [(13, 8, 0.5)]


def test_bad_weights_are_seen_before_they_show_in_the_history(x: Tensor, tmp_path: Path) -> None:
    """The last update of a stretch can ruin the weights with the history still spotless."""
    state = init_state(TINY, x)
    train_step(state, x)
    with torch.no_grad():
        next(state.energy.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(DivergenceError, match="non-finite weights at iteration 0"):
        training.check_health(state)


@pytest.mark.parametrize("when", [1, 4, 7, 9, 14, 23])
@pytest.mark.parametrize("config", [rolling(LATE), rolling(PROVOKED["saturation"][1])], ids=["late", "early"])
def test_resume_across_rollbacks_is_bit_exact(x: Tensor, tmp_path: Path, config: TrainConfig, when: int) -> None:
    straight = train(x, config, progress=False)
    assert straight.rollbacks[0].step > 6
    path = tmp_path / "c.safetensors"
    stopped = train(x, config, progress=False, checkpoint=path, checkpoint_every=3, stop=stop_after(when))
    loaded = load_checkpoint(path)
    assert loaded.step <= stopped.step and loaded.rollbacks == stopped.rollbacks[: len(loaded.rollbacks)]
    assert differing(straight, train(x, state=loaded, progress=False, checkpoint=path)) == []
    assert differing(straight, load_checkpoint(path)) == []
    assert differing(straight, train(x, state=stopped, progress=False)) == []  # also without the detour over the disk


def test_what_is_saved_has_stood_the_test(x: Tensor, tmp_path: Path) -> None:
    """A run that can roll back saves the state that it would return to."""
    path, seen = tmp_path / "c.safetensors", []
    config = rolling(TINY)
    train(x, config, progress=False, checkpoint=path, checkpoint_every=3, callback_every=1, callbacks=[
        lambda s: seen.append(load_checkpoint(path).step)
    ])  # fmt: skip
    assert seen == [0] * 8 + [4] * 3 + [8] * 3 + [8] * 3 + [12] * 3 + [16] * 3 + [24]


def test_rollbacks_are_kept_in_checkpoints(x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    state = train(x, rolling(LATE), progress=False)
    save_checkpoint(state, path)
    header, tensors = read_checkpoint(path)
    assert load_checkpoint(path).rollbacks == state.rollbacks != []
    entry = header["rollbacks"][0]
    for bad in ({}, [3], [entry] * 4, [entry | {"step": -1}], [entry | {"factor": "x"}], [entry | {"more": 1}]):
        write_atomically(path, training._pack(header | {"rollbacks": bad}, tensors))
        with pytest.raises(CheckpointError, match="rollback") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_command_line_shows_rollbacks(tmp_path: Path, quick_pictures: None) -> None:
    result = CliRunner().invoke(main, ["train", *ROLLING, "--runs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "energy gap; went back to 20, learning rate × 0.001" in result.stdout
    rows = (tmp_path / "digits" / "history.csv").read_text().splitlines()
    assert rows[0].endswith(",rollbacks") and rows[-1].endswith(",1")
    info = CliRunner().invoke(main, ["info", str(tmp_path / "digits"), "--json"])
    assert json.loads(info.stdout)["rollbacks"][0]["factor"] == 1e-3


def test_command_line_stops_in_one_line_and_leaves_the_history(tmp_path: Path, quick_pictures: None) -> None:
    result = CliRunner().invoke(main, ["train", *ROLLING, "--on-divergence", "stop", "--runs", str(tmp_path)])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "; try a smaller" in result.stderr
    rows = (tmp_path / "digits" / "history.csv").read_text().splitlines()
    gaps = [abs(float(row.split(",")[2])) for row in rows[1:]]
    assert max(gaps) > 50  # the file shows what tripped the monitor
    assert load_checkpoint(tmp_path / "digits" / FILES[0]).step < len(gaps)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("on_divergence", "panic"),
        ("on_divergence", None),
        ("max_rollbacks", -1),
        ("max_rollbacks", 1.5),
        ("rollback_factor", 0.0),
        ("rollback_factor", 1.1),
        ("final_rate", -0.1),
        ("final_rate", 1.1),
        ("final_rate", float("nan")),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", float("nan")),
    ],
)
def test_unusable_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        TrainConfig(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.cuda
def test_rollback_on_cuda(x: Tensor) -> None:
    state = train(x.cuda(), rolling(PROVOKED["gap"][1]), progress=False)
    assert state.rollbacks and state.history.isfinite().all() and state.history.is_cuda


# --- disks that refuse ----------------------------------------------------------------------------------------------

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


class BrokenFile:
    """A file that writes half of what it is given and then fails."""

    def __init__(self, file: Any, error: OSError):
        self.file, self.error = file, error

    def __enter__(self) -> "BrokenFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(content[: len(content) // 2])
        raise self.error


@pytest.fixture(params=[(place, number) for place in ("open", "write", "fsync", "replace") for number in ERRORS])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Callable[[], None], str]]:
    """A switch that makes the disk refuse, and what it will say."""
    place, number = request.param
    error = OSError(number, os.strerror(number))
    opened = Path.open

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    def failing_open(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode:
            return opened(path, mode, *args, **kwargs)
        if place == "open":
            raise error
        return BrokenFile(opened(path, mode, *args, **kwargs), error)

    def switch() -> None:
        if place in ("open", "write"):
            monkeypatch.setattr(Path, "open", failing_open)
        else:
            monkeypatch.setattr(os, place, fail)

    yield switch, os.strerror(number)
    monkeypatch.undo()


def test_a_failed_write_is_one_error_and_the_old_file_stands(
    tmp_path: Path, broken: tuple[Callable[[], None], str]
) -> None:
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    switch, why = broken
    switch()
    with pytest.raises(OSError, match=why) as caught:
        write_atomically(path, b"new and longer")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_run_that_cannot_save_keeps_its_last_checkpoint(
    x: Tensor, tmp_path: Path, broken: tuple[Callable[[], None], str]
) -> None:
    path = tmp_path / "c.safetensors"
    switch, why = broken
    state = init_state(TINY, x)
    with pytest.raises(CheckpointError, match=f"cannot write the checkpoint: {why}"):
        train(x, state=state, progress=False, checkpoint=path, checkpoint_every=2, callback_every=3, callbacks=[
            lambda s: switch()
        ])  # fmt: skip
    assert load_checkpoint(path).step == 2 and state.step == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.safetensors.lock", "c.safetensors"]
    with lock_checkpoint(path):  # the lock is free again
        pass


def test_a_disk_that_cannot_remove_either_still_names_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.bin"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        patched.setattr(Path, "unlink", fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert not path.exists()
    training.remove_leftovers(path)  # those of this process, too: the lock's holder has none open
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_real_limit_of_the_system(x: Tensor, tmp_path: Path) -> None:
    """No injected error: the kernel refuses to let a file grow beyond a limit."""
    import resource

    path = tmp_path / "c.safetensors"
    state = init_state(TINY, x)
    save_checkpoint(state, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write the checkpoint: File too large"):
            save_checkpoint(state, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def refused(result: click.testing.Result, *words: str) -> None:
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and all(word in last for word in words), result.stderr


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    refused(CliRunner().invoke(main, ["train", *SETTINGS, "--runs", str(tmp_path / "file")]), "file")
    refused(CliRunner().invoke(main, ["train", *SETTINGS, "--runs", str(tmp_path), "--name", "file"]), "file")
    refused(CliRunner().invoke(main, ["train", "--resume", str(tmp_path / "file")]), "no such folder")
    assert (tmp_path / "file").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1
    if Path("/proc/self").exists():
        refused(CliRunner().invoke(main, ["train", *SETTINGS, "--runs", "/proc/self"]), "/proc/self")
        with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
            train(digits("train")[0], TINY, progress=False, checkpoint="/proc/self/c.safetensors")


def test_a_command_that_cannot_write_says_which_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[Callable[[], None], str]
) -> None:
    switch, why = broken
    monkeypatch.setattr(
        cli, "write_run", lambda state, folder: (switch(), write_atomically(folder / "history.csv", b""))
    )
    result = CliRunner().invoke(main, ["train", *SETTINGS, "--runs", str(tmp_path)])
    refused(result, why, "history.csv")
    assert load_checkpoint(tmp_path / "digits" / FILES[0]).step == 2


# --- the lock -------------------------------------------------------------------------------------------------------


def test_the_lock_is_held_while_training_and_freed_by_every_exit(x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    attempt = f"from filelock import FileLock; FileLock({str(tmp_path / '.c.safetensors.lock')!r}, timeout=0).acquire()"

    def is_free() -> bool:
        return subprocess.run([sys.executable, "-c", attempt], capture_output=True, check=False).returncode == 0

    seen = []
    train(x, TINY, progress=False, checkpoint=path, callback_every=12, callbacks=[lambda s: seen.append(is_free())])
    assert seen == [False, False] and is_free()
    with pytest.raises(DivergenceError) as error:
        train(x, WILD, progress=False, checkpoint=path)
    assert is_free() and error.tb, "also while somebody, as a notebook does, keeps the traceback"
    with pytest.raises(KeyboardInterrupt) as interrupt:
        train(x, TINY, progress=False, checkpoint=path, stop=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert is_free() and interrupt.tb


def test_a_locked_checkpoint_is_refused_and_left_alone(x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"precious")
    lock = tmp_path / ".c.safetensors.lock"
    hold = f"import time; from filelock import FileLock; lock = FileLock({str(lock)!r}); lock.acquire(); "
    hold += "print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(CheckpointError, match="another process is training here"):
            train(x, TINY, progress=False, checkpoint=path)
        assert path.read_bytes() == b"precious"
    finally:
        holder.kill()
        holder.wait()
    assert train(x, TINY, progress=False, checkpoint=path).step == 24


if __name__ == "__main__":
    torturer = Torturer(Path(sys.argv[1]), int(sys.argv[4]))
    for number in range(int(sys.argv[3])):
        found = torturer.case(number) if sys.argv[2] == "kill" else torturer.two_at_once()
        print(json.dumps(found), flush=True)
