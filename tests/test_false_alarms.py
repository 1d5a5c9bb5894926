"""The statistical suite as a whole: its joint false-alarm rate, that nothing is missing from it, and fresh seeds.

One command repeats every test of ledger.py on twenty sets of seeds that nobody chose:

    pytest -m slow tests/test_false_alarms.py

and `pytest -m statistical --seed-offset 7` (or EBM_LIT_SEED=7) on one of them.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ledger import JOINT_FALSE_ALARM, LEDGER, POWER

TESTS = Path(__file__).parent
# What only a test says that draws numbers and may be unlucky.
TELLTALE = re.compile(r"false alarm:? \d|\d standard errors|kstest|\.pvalue|p_values?\(|chi2\.sf", re.IGNORECASE)


def functions_of(path: Path) -> dict[str, str]:
    """Name and source of every test function of a file."""
    text = path.read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(text, node) or "" for node in nodes if node.name.startswith("test_")}


def test_joint_false_alarm() -> None:
    rates = [rate for tests in LEDGER.values() for rate in tests.values()]
    assert len(rates) >= 30 and all(0 < rate <= 2e-5 for rate in rates)
    assert sum(rates) <= JOINT_FALSE_ALARM, f"{sum(rates):.2e}"


@pytest.mark.parametrize("name", LEDGER)
def test_ledger_names_tests_that_exist(name: str) -> None:
    assert set(LEDGER[name]) <= set(functions_of(TESTS / name))


@pytest.mark.parametrize("path", sorted(TESTS.glob("test_*.py")), ids=lambda p: p.name)
def test_no_statistical_test_is_missing_from_the_ledger(path: Path) -> None:
    if path == Path(__file__):
        return
    found = {name for name, text in functions_of(path).items() if TELLTALE.search(text)}
    known = set(LEDGER.get(path.name, {}))
    assert found <= known, sorted(found - known)


def test_power_of_every_registered_test_is_stated() -> None:
    """In its docstring, in POWER, or the test is one of power itself."""
    said = re.compile(r"[Pp]ower|sees|caught|[Mm]issed|certain")
    texts = {test: functions_of(TESTS / name)[test] for name, tests in LEDGER.items() for test in tests}
    silent = {test for test, text in texts.items() if "power" not in test and not said.search(text)}
    assert silent <= set(POWER) <= set(texts), sorted(silent ^ set(POWER))


def test_telltale_finds_what_is_registered() -> None:
    """The net is fine enough: most of the registered tests would be found by it."""
    texts = [functions_of(TESTS / name)[test] for name, tests in LEDGER.items() for test in tests]
    assert sum(bool(TELLTALE.search(text)) for text in texts) >= 0.8 * len(texts)


def test_fresh_seeds_reach_every_generator(pytester: pytest.Pytester) -> None:
    """The same test sees other numbers with another offset, the usual ones without, and only if it is registered."""
    (pytester.path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (pytester.path / "ledger.py").write_text("LEDGER = {'test_seeds.py': {'test_registered': 1e-6}}\n")
    (pytester.path / "test_seeds.py").write_text(
        """
import torch

def seeds(make):
    made = make(5), torch.Generator().manual_seed(5), torch.Generator("cpu").manual_seed(5)
    return [g.initial_seed() for g in made]

def test_registered(make_generator):
    print("registered", *seeds(make_generator))
    torch.randn(2, generator=make_generator(5))

def test_other(make_generator):
    print("other", *seeds(make_generator))
"""
    )
    for offset in (0, 2):
        result = pytester.runpytest_subprocess("-s", "--seed-offset", str(offset))
        seed = 5 + offset * 1_000_003
        result.stdout.fnmatch_lines([f"*registered {seed} {seed} {seed}*", "*other 5 5 5*"])
        result.assert_outcomes(passed=2)


@pytest.mark.slow
@pytest.mark.parametrize("offset", range(1, 21))
def test_fresh_seeds(offset: int) -> None:
    """Every test of the ledger but the slow ones, with seeds that were not chosen."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "statistical and not slow",
        "-p",
        "no:cacheprovider",
        str(TESTS),
    ]
    environment = os.environ | {"EBM_LIT_SEED": str(offset)}
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    print(run.stdout.splitlines()[-1])
    assert run.returncode == 0, run.stdout[-4000:]
