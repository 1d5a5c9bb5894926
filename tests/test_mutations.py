"""The mutation check: its list can be carried out, its machine tells right from wrong, its stored report fits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
SCRIPT = ROOT / "benchmarks" / "mutations.py"

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a system that can fork")
mutations = pytest.importorskip("mutations") if sys.platform != "win32" else None


@posix
def test_every_mistake_can_still_be_planted() -> None:
    """Each snippet stands in its module exactly once, the wrong module compiles and is another one, tests exist."""
    for mistake in mutations.MISTAKES:
        mutations.check(mistake)
    names = [mistake.name for mistake in mutations.MISTAKES]
    plans = {mutations.plan_of(mistake) for mistake in mutations.MISTAKES}
    assert len(set(names)) == len(plans) == len(names) >= 30
    written_by_hand = {path.stem for path in (ROOT / "ebm_lit").glob("*.py")} - {"__init__", "_modidx"}
    planted = {mistake.module for mistake in mutations.MISTAKES}
    assert written_by_hand - planted == {"plotting", "widgets", "pretrained"}


@posix
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"old": "there is no such line"}, "stands 0 times"),
        ({"old": "return"}, "expected once"),
        ({"new": "    return (", "old": "    return x - step_size * grad + noise_scale * noise"}, "never closed"),
        ({"new": "return x - step_size * grad  + noise_scale * noise"}, "stays the same"),
        ({"tests": ("test_langevin.py::test_nothing",)}, "there is no test"),
        ({"tests": ("test_nothing.py",)}, "there is no test"),
    ],
)
def test_a_plan_that_has_rotted_is_noticed(changes: dict, says: str) -> None:
    good = {
        "name": "a mistake",
        "module": "langevin",
        "old": "return x - step_size * grad + noise_scale * noise",
        "new": "return x",
        "tests": ("test_langevin.py::test_one_step_by_hand",),
    }
    mutations.check(mutations.Mistake(**good))
    with pytest.raises((ValueError, SyntaxError), match=says):
        mutations.check(mutations.Mistake(**(good | changes)))


TOY = "def double(x):\n    return 2 * x\n\n\ndef same(x):\n    return 1 * x\n"
TOY_TESTS = """
from ebm_lit.toy import double, same

def test_a_wide_net():
    assert double(0) == 0

def test_specific():
    assert double(2) == 4

def test_also():
    assert double(3) == 6
"""
TRIAL = """
import json, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import mutations
tree, found = Path(sys.argv[1]), {}
for name, new in json.loads(sys.argv[3]).items():
    mistake = mutations.Mistake(name, "toy", "2 * x", new, ("test_toy.py::test_specific", "test_toy.py"))
    found[name] = mutations.verdict(mistake, tree, patience=5 if name == "endless" else 300)
    assert "2 * x" in (tree / "ebm_lit" / "toy.py").read_text()
rows = {"right": {"caught_by": "tests/test_toy.py::test_also", "control": None, "outcome": "caught"}}
mutations.control_run(tree, rows, print)
found["control of a right tree"] = rows["right"]
(tree / "ebm_lit" / "toy.py").write_text("def double(x):\\n    return 0\\n\\n\\nsame = double\\n")
rows = {"wrong": {"caught_by": "tests/test_toy.py::test_also", "control": None, "outcome": "caught"}}
mutations.control_run(tree, rows, print)
found["control of a wrong tree"] = rows["wrong"]
(tree / "found.json").write_text(json.dumps(found))
"""


@posix
def test_verdicts(tmp_path: Path) -> None:
    """A tiny package with tests of its own: caught, survived, broken, endless and a bad control are told apart."""
    for name, text in {
        "ebm_lit/__init__.py": "",
        "ebm_lit/toy.py": TOY,
        "tests/test_toy.py": TOY_TESTS,
        "pyproject.toml": "[tool.pytest.ini_options]\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    changes = {
        "wrong": "3 * x",
        "harmless": "x * 2",
        "no module": "2 * x\n\n\nimport no_such_module",
        "endless": "[0 for _ in iter(int, 1)] or 2 * x",
    }
    command = [sys.executable, "-c", TRIAL, str(tmp_path), str(SCRIPT.parent), json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"]["outcome"] == "caught" and found["wrong"]["ran"] == 1
    assert found["wrong"]["caught_by"] == "tests/test_toy.py::test_specific" and "6 == 4" in found["wrong"]["said"]
    assert found["harmless"]["outcome"] == "survived" and found["harmless"]["ran"] == 3
    assert found["no module"]["outcome"] == "broken"
    assert found["endless"]["outcome"] == "no end"
    assert found["control of a right tree"]["control"] is True
    assert found["control of a wrong tree"]["control"] is False


@posix
def test_one_mistake_for_real(tmp_path: Path) -> None:
    """The documented command, on one mistake; the checkout stays as it is."""
    module = ROOT / "ebm_lit" / "contrastive_divergence.py"
    before = module.read_bytes()
    command = [sys.executable, str(SCRIPT), "--store", "--folder", str(tmp_path), "--only", "ages not advanced"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert module.read_bytes() == before
    report = json.loads((tmp_path / "mutations.json").read_text())
    row = report["mistakes"]["ages not advanced"]
    assert row["outcome"] == "caught" and row["control"] is True
    assert row["caught_by"].startswith("tests/test_contrastive_divergence.py::")
    again = subprocess.run(command, capture_output=True, text=True, check=True)  # nothing is old: nothing is planted
    assert "caught " not in again.stdout.split("# Planted mistakes")[0]
    assert json.loads((tmp_path / "mutations.json").read_text()) == report


@posix
def test_stored_report_is_of_this_list_and_meets_its_target() -> None:
    folder = mutations.RESULTS
    if not (folder / "mutations.json").exists():
        pytest.skip("no stored report: python benchmarks/mutations.py --store")
    report = json.loads((folder / "mutations.json").read_text(encoding="utf-8"))
    rows = report["mistakes"]
    assert list(rows) == [mistake.name for mistake in mutations.MISTAKES]
    for mistake in mutations.MISTAKES:
        row = rows[mistake.name]
        assert row["plan"] == mutations.plan_of(mistake), f"{mistake.name}: python benchmarks/mutations.py --store"
        if row["outcome"] == "caught":
            file, name = row["caught_by"].partition("[")[0].split("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), row["caught_by"]
        else:
            assert row["outcome"] == "survived" and len(mistake.survives) > 20, mistake.name
    caught = sum(row["outcome"] == "caught" for row in rows.values())
    assert report["summary"] == mutations.summarise(rows) and report["summary"]["control"]
    assert caught >= 25 and caught >= mutations.TARGET * len(rows)
    assert (folder / "mutations.md").read_text(encoding="utf-8") == mutations.table(report)
