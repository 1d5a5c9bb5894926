"""Mutation check: would the fast tests notice a mistake? Every mistake of mistakes.py is planted once, alone.

    python benchmarks/mutations.py                    plant what is new or has changed since, show the table
    python benchmarks/mutations.py --store            and keep benchmarks/results/mutations.json and mutations.md
    python benchmarks/mutations.py --all --store      plant everything again
    python benchmarks/mutations.py --only ais         only mistakes whose module or name contains "ais"

A mistake is planted in a temporary copy of package and tests, never in the checkout: one snippet of one module of
`ebm_lit` that must stand there exactly once. The tests that concern it run until the first one fails, without those
marked `slow`. In the end all tests that caught something run once more in the copy without any mistake, and must pass.

One process imports PyTorch and forks a child for every mistake, so this needs a system that can fork (not Windows).
Results are stored one by one: a run that was interrupted goes on where it stopped.
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mistakes import MISTAKES, Mistake

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COPIED = (
    "ebm_lit/*",
    "tests/*.py",
    "benchmarks/*.py",
    "benchmarks/results/*",
    "nbs/execute.py",
    "pyproject.toml",
    "settings.ini",
)
TARGET = 0.95  # share of the mistakes that must be caught
KEPT = ("caught_by", "said", "ran", "cpu_seconds", "seconds")
PATIENCE = 900.0  # seconds of wall-clock time for the tests of one mistake, on a busy machine


# --- planting -------------------------------------------------------------------------------------------------------


def planted(mistake: Mistake, text: str) -> str:
    """The module with the mistake in it. Raises `ValueError` unless it can be planted in exactly one place."""
    found = text.count(mistake.old)
    if found != 1:
        raise ValueError(f"{mistake.name}: the snippet stands {found} times in {mistake.module}.py, expected once")
    return text.replace(mistake.old, mistake.new)


def check(mistake: Mistake) -> None:
    """Raises `ValueError`, or a `SyntaxError`, unless this is a plan that can be carried out today."""
    path = ROOT / "ebm_lit" / f"{mistake.module}.py"
    text = path.read_text(encoding="utf-8")
    wrong = ast.parse(planted(mistake, text))
    compile(wrong, str(path), "exec")
    if ast.dump(wrong) == ast.dump(ast.parse(text)):
        raise ValueError(f"{mistake.name}: the code stays the same")
    for test in mistake.tests:
        file, _, name = test.partition("::")
        source = ROOT / "tests" / file
        if not source.is_file() or (name and f"\ndef {name}(" not in source.read_text(encoding="utf-8")):
            raise ValueError(f"{mistake.name}: there is no test {test}")


def fingerprint(mistake: Mistake) -> str:
    """Of all that the verdict depends on most: the mistake, its module, its tests."""
    parts = [mistake.module, mistake.old, mistake.new, *mistake.tests]
    files = [ROOT / "ebm_lit" / f"{mistake.module}.py", ROOT / "tests" / "conftest.py"]
    files += [ROOT / "tests" / name for name in mistake.files]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def plan_of(mistake: Mistake) -> str:
    """Of the mistake alone: a stored verdict belongs to this one and to no other."""
    return hashlib.sha256("\0".join((mistake.module, mistake.old, mistake.new)).encode()).hexdigest()[:16]


def copy_tree(target: Path) -> Path:
    """Package and tests in a new folder."""
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_file():
                copy = target / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
    return target


# --- running tests --------------------------------------------------------------------------------------------------


class Recorder:
    """A plugin of pytest: the most specific tests first; the first one that fails; how many ran."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.order = {name: i for i, name in enumerate(tests)}
        self.facts: dict[str, Any] = {"caught_by": None, "said": "", "ran": 0, "failed": []}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def rank(item: pytest.Item) -> int:
            name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
            return self.order.get(name, len(self.order) + self.order.get(item.path.name, 0))

        items.sort(key=rank)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.facts["ran"] += report.when == "call"
        if not report.failed:
            return
        self.facts["failed"].append(report.nodeid)
        if self.facts["caught_by"] is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash else str(report.longrepr)
            said = re.sub(rf"{re.escape(tempfile.gettempdir())}\S*", "<a temporary file>", said.strip().split("\n")[0])
            self.facts |= {"caught_by": report.nodeid, "said": said[:160]}


def _child(tree: Path, tests: Sequence[str], options: Sequence[str], answer: Path) -> None:
    """Run tests in the copy, in this process, and write down what happened."""
    os.setsid()  # so that whatever the tests start can be ended together
    log = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p).resolve() != ROOT)]
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    recorder = Recorder(tests)
    targets = [f"tests/{name}" for name in (tests if options else dict.fromkeys(t.split("::")[0] for t in tests))]
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--durations=0", *(options or ["-x"]), *targets], [recorder])
    package = sys.modules.get("ebm_lit")
    inside = package is not None and Path(str(package.__file__)).is_relative_to(tree)
    answer.write_text(json.dumps(recorder.facts | {"code": int(code), "inside": inside}), encoding="utf-8")


def run_tests(
    tree: Path, tests: Sequence[str], options: Sequence[str] = (), patience: float = PATIENCE
) -> dict[str, Any]:
    """Run tests of a copy in a child; `code` is pytest's, None if they were still running when the time was over."""
    answer = tree / "answer.json"
    answer.unlink(missing_ok=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        try:
            _child(tree, tests, options, answer)
        finally:
            os._exit(0)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.perf_counter() - start > patience:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.02)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {"code": None, "caught_by": None}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return facts | {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(cpu, 1)}


def verdict(mistake: Mistake, tree: Path, patience: float = PATIENCE) -> dict[str, Any]:
    """Plant a mistake in the copy, run its tests, take it out again."""
    path = tree / "ebm_lit" / f"{mistake.module}.py"
    right = path.read_text(encoding="utf-8")
    path.write_text(planted(mistake, right), encoding="utf-8")
    try:
        facts = run_tests(tree, mistake.tests, patience=patience)
    finally:
        path.write_text(right, encoding="utf-8")
    outcomes = {0: "survived", 1: "caught", None: "no end"}
    outcome = outcomes.get(facts.pop("code"), "broken")
    if outcome != "no end" and not facts.pop("inside"):
        outcome = "broken"  # the tests did not import the copy
    return {"outcome": outcome, **{k: facts.get(k) for k in KEPT}, "control": None if outcome == "caught" else True}


# --- the report -----------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    mistakes, summary = report["mistakes"], report["summary"]
    lines = [
        "# Planted mistakes",
        "",
        "Written by `python benchmarks/mutations.py --store`; the list is in [mistakes.py](../mistakes.py). Each",
        "mistake was planted alone in a copy of the package; the fast tests that concern it ran until one failed.",
        "",
        f"**{summary['caught']} of {summary['planted']} caught** ({summary['share']:.1%}), in "
        f"{summary['cpu_seconds'] / 60:.1f} minutes of one core. Without any mistake, the tests that caught one pass: "
        f"{'yes' if summary['control'] else 'NOT ALL OF THEM'}.",
        "",
        "| module | mistake | first test that fails | s |",
        "|---|---|---|---|",
    ]
    for name, row in mistakes.items():
        test = (row["caught_by"] or "").removeprefix("tests/").replace("|", "\\|")
        found = f"`{test}`" if row["outcome"] == "caught" else f"**{row['outcome']}**"
        lines.append(f"| `{row['module']}` | {name} | {found} | {row['cpu_seconds']:.0f} |")
    left = {name: row for name, row in mistakes.items() if row["outcome"] != "caught"}
    lines += ["", "## Survivors", "", *(f"- **{name}**: {row['survives']}" for name, row in left.items())]
    return "\n".join([*lines, *([] if left else ["None."]), ""])


def summarise(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the report says first; `control`: does every test that caught something pass without the mistake?"""
    caught = sum(row["outcome"] == "caught" for row in rows.values())
    return {
        "planted": len(rows),
        "caught": caught,
        "share": round(caught / max(1, len(rows)), 4),
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows.values()), 1),
        "control": all(row["control"] for row in rows.values()),
    }


def write(report: dict[str, Any], folder: Path) -> None:
    """Keep the report as JSON and as a table; each file is replaced in one go."""
    for name, text in (("mutations.json", json.dumps(report, indent=1) + "\n"), ("mutations.md", table(report))):
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run by name."""
    path = folder / "mutations.json"
    return json.loads(path.read_text(encoding="utf-8"))["mistakes"] if path.is_file() else {}


def control_run(tree: Path, rows: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
    """Run the tests that caught something once more, in the copy without a mistake; those that fail catch nothing."""
    open_rows = [row for row in rows.values() if not row["control"]]
    tests = sorted({row["caught_by"].removeprefix("tests/") for row in open_rows})
    if not tests:
        return
    facts = run_tests(tree, tests, ["--maxfail=1000"], patience=4 * PATIENCE)
    for row in open_rows:
        row["control"] = facts["code"] in (0, 1) and row["caught_by"] not in facts["failed"]
    say(f"control run of {len(tests)} tests: {facts['cpu_seconds']:.0f} s; failed: {facts.get('failed')}")


def run(
    mistakes: Sequence[Mistake], folder: Path | None, again: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Plant all mistakes whose stored verdict is missing or old; with a folder, every verdict is kept at once."""
    known = {} if folder is None else stored(folder)
    rows = {m.name: known[m.name] for m in MISTAKES if m.name in known}
    environment = {"python": platform.python_version(), "torch": sys.modules["torch"].__version__}

    def report() -> dict[str, Any]:
        ordered = {m.name: rows[m.name] | {"survives": m.survives} for m in MISTAKES if m.name in rows}
        made = {"summary": summarise(ordered), "environment": environment, "mistakes": ordered}
        if folder is not None:
            write(made, folder)
        return made

    with tempfile.TemporaryDirectory() as home:
        tree = copy_tree(Path(home).resolve() / "tree")
        for mistake in mistakes:
            mark = fingerprint(mistake)
            if again or rows.get(mistake.name, {}).get("fingerprint") != mark:
                row = verdict(mistake, tree)
                rows[mistake.name] = {"module": mistake.module, "plan": plan_of(mistake), "fingerprint": mark} | row
                say(f"{row['outcome']:9s} {row['cpu_seconds']:6.1f} s  {mistake.name}  {row['caught_by'] or ''}")
                if row["outcome"] == "broken":
                    say((tree / "output.txt").read_text(encoding="utf-8", errors="replace")[-2000:])
                report()
        control_run(tree, rows, say)
    return report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--store", action="store_true", help="keep the report in benchmarks/results")
    parser.add_argument("--all", action="store_true", help="plant those again, too, whose stored verdict is up to date")
    parser.add_argument("--only", default="", help="only mistakes whose module or name contains this")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where reports are kept")
    options = parser.parse_args()
    for mistake in MISTAKES:
        check(mistake)
    import scipy.stats  # noqa: F401  imported before the children are forked, because it takes seconds
    import sklearn.metrics  # noqa: F401
    import torch  # noqa: F401

    chosen = [m for m in MISTAKES if options.only.lower() in f"{m.module}: {m.name}".lower()]
    report = run(chosen, options.folder if options.store else None, options.all)
    print("\n" + table(report))
    if report["summary"]["share"] < TARGET or not report["summary"]["control"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
