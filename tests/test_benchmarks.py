"""The speed benchmark runs, counts right, and notices a contender that computes something else."""

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
STORED = sorted((ROOT / "benchmarks" / "results").glob("langevin_speed_*.json"))
CPU = torch.device("cpu")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/langevin_speed.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import langevin_speed

    return langevin_speed


def test_smoke_run(tmp_path: Path) -> None:
    """The documented command in its small size, in a process of its own."""
    output = tmp_path / "speed.json"
    script = ROOT / "benchmarks" / "langevin_speed.py"
    command = [sys.executable, str(script), "--smoke", "--threads", "1", "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text(encoding="utf-8"))
    assert set(report["cases"]) == {"cnn_16", "mlp_256", "train_60"}
    taking_part = {"ebm_lit", "textbook"} | ({"torchebm", "ebmkit"} - set(report["skipped"]))
    for case in report["cases"].values():
        assert set(case["rate"]) == set(case["seconds"]) == set(case["moments"]) == taking_part
        assert all(len(values) == case["repeats"] for values in case["seconds"].values())
        assert set(case["ratio"]) == taking_part - {"ebm_lit"}
    for key in ("cnn_16", "mlp_256"):
        assert all(0 < share < 1 for share in report["cases"][key]["share_of_peak"].values())
    assert report["memory"]["ratio"]["ebm_lit"][0] < 1.02
    assert all(f"without {name}: {reason}" in done.stdout for name, reason in report["skipped"].items())


def sabotage(change: Callable[[Any], Any]) -> Callable[[nn.Module, Any, torch.device], Callable[[Tensor], Tensor]]:
    """The textbook's loop with settings that are not those of the case."""

    def build(net: nn.Module, case: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
        import contenders

        return contenders.chain_textbook(net, change(case), device)

    return build


WRONG = {
    "too much noise": lambda case: replace(case, noise_scale=1.2 * case.noise_scale),
    "half the steps": lambda case: replace(case, n_steps=case.n_steps // 2),
    "uphill": lambda case: replace(case, step_size=-case.step_size),
    "half the step size": lambda case: replace(case, step_size=case.step_size / 2),
}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is kept of freed memory is glibc's affair")
def test_a_freed_block_saves_the_plain_loop_its_page_faults() -> None:
    """Blocks of 2 MB in every step, from the system or from what the process has kept; ours needs none either way."""
    code = """
import json, sys, torch, contenders, langevin_speed as speed
from dataclasses import replace
torch.set_num_threads(1)
case = replace(speed.CHAIN_CASES[sys.argv[1]], n_steps=5, repeats=4)
print(json.dumps(speed.run_chains(case, ["ebm_lit", "textbook"], torch.device("cpu"))[0]["page_faults"]))
"""
    found = {}
    for key in ("mlp_4096", "mlp_4096_kept"):
        command = [sys.executable, "-c", code, key]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "benchmarks")
        found[key] = json.loads(done.stdout.splitlines()[-1])
    from_system, kept = (statistics.median(faults["textbook"]) for faults in found.values())
    assert max(found["mlp_4096"]["textbook"]) > 5 * 256, "more than a block of 1 MB a step, if not in every repeat"
    assert 4 * kept < from_system
    assert all(statistics.median(faults["ebm_lit"]) < 256 for faults in found.values())


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
@pytest.mark.parametrize("name", [None, *WRONG])
def test_whoever_samples_another_law_is_found_out(
    speed: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, name: str | None
) -> None:
    """Seeds are fixed; an honest contender is accused with probability of some 1e-4 at other ones."""
    torch.manual_seed(0)
    case = replace(speed._cnn(32, 4) if kind == "cnn" else speed._mlp(2048, 20), repeats=2)
    if name is not None:
        monkeypatch.setitem(speed.CHAINS, "ebm_lit", sabotage(WRONG[name]))
    result, wrong = speed.run_chains(case, ["ebm_lit", "textbook"], CPU)
    assert bool(wrong) == (name is not None), (wrong, result["moments"])


def test_clamping_is_compared(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(speed.CHAINS, "ebm_lit", sabotage(lambda case: replace(case, bounds=None)))
    _, wrong = speed.run_chains(replace(speed._cnn(16, 4), repeats=2), ["ebm_lit", "textbook"], CPU)
    assert wrong


def test_our_gradients_are_compared_with_the_plain_network(speed: ModuleType) -> None:
    """The honest sampler passes; a network that differs by 1e-4 does not, nor does a NaN."""
    case = speed._mlp(64, 5)
    net, other = case.network(CPU), case.network(CPU)
    x = case.starts(0, CPU)
    assert speed.disagreements("", speed.agreement(net, case, x)) == []
    with torch.no_grad():
        other.net[0].weight.mul_(1 + 1e-4)
    off = agreement_of(speed, other, net, case, x)
    assert len(speed.disagreements("", off)) >= 2
    assert len(speed.disagreements("", dict.fromkeys(off, float("nan")))) == 3


def agreement_of(speed: ModuleType, sampled: nn.Module, plain: nn.Module, case: Any, x: Tensor) -> dict[str, float]:
    """`agreement` of a sampler that walks on another network than the plain one."""

    class Other(speed.Langevin):  # type: ignore[name-defined,misc]
        def run(self, energy: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return super().run(sampled if energy is plain else energy, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "Langevin", Other)
        return speed.agreement(plain, case, x)


def test_every_contender_has_its_turn_in_every_repeat_and_at_every_place(speed: ModuleType) -> None:
    turns = list(speed.in_turns(["a", "b", "c"], 6))
    orders = [[name for r, name in turns if r == repeat] for repeat in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert all(sorted(order[place] for order in orders) == ["a", "a", "b", "b", "c", "c"] for place in range(3))
    assert len({tuple(order) for order in orders}) == 6


def test_ratios_are_formed_within_a_repeat(speed: ModuleType) -> None:
    """A machine that is ten times slower in one repeat changes no ratio."""
    found = speed.summary({"ebm_lit": [1.0, 10.0, 1.0], "textbook": [2.0, 20.0, 2.0], "ebmkit": [3.0, 30.0, 3.0]}, 6)
    assert found["ratio"]["textbook"] == dict.fromkeys(["median", "q25", "q75", "min", "max"], 2.0)
    assert found["fastest_peer"] == "textbook" and found["rate"] == {"ebm_lit": 6.0, "textbook": 3.0, "ebmkit": 2.0}


def test_work_is_counted_on_the_plain_network(speed: ModuleType) -> None:
    """An MLP from 2 over three layers of 128 to 1: a product forward and one back for each layer, 2 FLOPs a term."""
    case = speed._mlp(256, 1)
    terms = 2 * 128 + 2 * 128 * 128 + 128
    assert speed.flops_per_step(case.network(CPU), case.starts(0, CPU)) == 2 * 2 * 256 * terms


def test_formulas_are_sampled_and_compared(speed: ModuleType) -> None:
    """The energies that stand in the table of the compiler, at a small size, ours against the textbook's."""
    torch.manual_seed(0)
    for case in speed.FORMULA_CASES.values():
        result, wrong = speed.run_chains(replace(case, batch=256, n_steps=8, repeats=2), ["ebm_lit", "textbook"], CPU)
        assert wrong == [] and result["agreement"]["engine"].startswith("autograd")


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_results_are_complete(speed: ModuleType, path: Path) -> None:
    report = json.loads(path.read_text(encoding="utf-8"))
    chains = [key for key, case in speed.CHAIN_CASES.items() if not case.freed or report["machine"]["device"] == "cpu"]
    assert list(report["cases"]) == [*chains, *speed.TRAIN_CASES] and report["skipped"] == {}
    for case in report["cases"].values():
        assert set(case["seconds"]) == {"ebm_lit", "textbook", "torchebm", "ebmkit"}
        if case["kind"] != "training" and not case["freed"]:
            assert case["compiled"]["first_call_seconds"] > 0 and case["compiled"]["z"] <= speed.Z_LIMIT
        assert all(len(values) == case["repeats"] >= 10 for values in case["seconds"].values())
        assert all(moments.get("z", 0.0) <= speed.Z_LIMIT for moments in case["moments"].values())
        ours = case["seconds"]["ebm_lit"]
        for name, values in case["seconds"].items():
            if name != "ebm_lit":
                again = statistics.median(t / o for t, o in zip(values, ours, strict=True))
                assert case["ratio"][name]["median"] == pytest.approx(again, rel=1e-3)
    assert set(report["formulas"]) == set(speed.FORMULA_CASES)
    for case in report["formulas"].values():
        assert case["compiled"]["first_call_seconds"] > 0 and case["compiled"]["z"] <= speed.Z_LIMIT
    assert set(report["memory"]["ratio"]) == {"ebm_lit", "textbook", "torchebm", "ebmkit"}


def test_what_cannot_be_compiled_is_reported(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import contenders

    def gives_up(net: nn.Module, case: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
        def chain(x0: Tensor) -> Tensor:
            raise contenders.NotCompiled("no C++ compiler")

        return chain

    monkeypatch.setitem(speed.CHAINS, speed.COMPILED, gives_up)
    assert speed.run_compiled(replace(speed._mlp(16, 2), repeats=2), CPU) == ({"gave_up": "no C++ compiler"}, [])
