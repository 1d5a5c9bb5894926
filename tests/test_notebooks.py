"""Every notebook runs from top to bottom in a fresh kernel, and its exercises' solutions run after it.

Sizes are shrunken (EBM_LIT_FAST=1); nbs/execute.py runs the same notebooks in full size.
"""

import re
from pathlib import Path

import execute
import pytest

FOLDED = re.compile(r"<details>(.*?)</details>", re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in execute.notebooks()]


def solutions(path: Path) -> list[str]:
    """The fenced Python blocks inside `<details>`, in order."""
    cells = [execute.source(cell) for cell in execute.read(path)["cells"] if cell["cell_type"] == "markdown"]
    return [code for text in cells for folded in FOLDED.findall(text) for code in PYTHON.findall(folded)]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_and_its_solutions_run(path: Path) -> None:
    execute.execute(path, fast=True, extra_cells=solutions(path))


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.values[0].parent.name == "nbs"])
def test_chapter_has_exercises_whose_solutions_check_themselves(path: Path) -> None:
    found = solutions(path)
    assert found, "no fenced Python solution inside <details>"
    for code in found:
        assert re.search(r"^\s*assert ", code, re.MULTILINE), f"a solution without an assertion:\n{code}"
