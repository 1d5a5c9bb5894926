"""nbs/execute.py: what it stores, and when it says that stored outputs belong to other code."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import execute
import numpy as np
import pytest
from PIL import Image


def notebook(*codes: str) -> dict[str, Any]:
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": ["# T\n", "> s"]}]
    for number, code in enumerate(codes):
        cell = {"cell_type": "code", "id": f"code{number}", "metadata": {}, "source": code.splitlines(keepends=True)}
        cells.append(cell | {"execution_count": None, "outputs": []})
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def written(folder: Path, *codes: str) -> Path:
    path = folder / "some.ipynb"
    execute.write(notebook(*codes), path)
    return path


def test_outputs_are_stored_clean_and_belong_to_their_code(tmp_path: Path) -> None:
    codes = (
        "import os, sys, warnings\nfrom tqdm import tqdm",
        "for _ in tqdm(range(3)): pass\nprint('kept'); print(os.environ.get('EBM_LIT_FAST'), os.getcwd() == sys.argv)",
        "print('10%\\r 50%\\rdone'); object()",
        "warnings.warn('careful')",
        "from IPython.display import display\nimport ipywidgets\ndisplay(ipywidgets.IntSlider())",
    )
    path = written(tmp_path, *codes)
    assert execute.why_stale(execute.read(path)) == "never executed by nbs/execute.py"
    assert execute.main([str(path)]) == 0
    nb = execute.read(path)
    assert execute.why_stale(nb) is None and execute.main(["--check", str(path)]) == 0
    outputs = [cell["outputs"] for cell in execute.code_cells(nb)]
    assert outputs[0] == [] and outputs[4] == [], "a widget lives in a kernel only"
    assert outputs[1] == [{"name": "stdout", "output_type": "stream", "text": ["kept\n", "None False\n"]}]
    assert outputs[2][0]["text"] == ["done\n"] and outputs[2][1]["data"]["text/plain"] == ["<object>"]
    assert outputs[3][0]["text"][0] == "<cell>:1: UserWarning: careful\n" and execute.stderr_cells(nb) == [4]
    assert set(nb["metadata"]) == {"kernelspec", "ebm_lit"}
    assert all(cell["metadata"] == {} for cell in nb["cells"]) and list(tmp_path.iterdir()) == [path]
    nb["cells"][1]["source"] = ["import os"]
    assert "code cells have changed" in (execute.why_stale(nb) or "")


def test_text_may_change_after_execution(tmp_path: Path) -> None:
    path = written(tmp_path, "print(1)")
    assert execute.main([str(path)]) == 0
    nb = execute.read(path)
    nb["cells"][0]["source"] = ["# Another title\n", "> s"]
    assert execute.why_stale(nb) is None


def test_failure_stores_nothing_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "print(1)", "assert 1 == 2, 'told'")
    before = path.read_bytes()
    assert execute.main([str(path)]) == 1
    assert "told" in capsys.readouterr().out
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_fast_runs_with_the_switch_and_stores_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "import os\nassert os.environ['EBM_LIT_FAST'] == '1'")
    before = path.read_bytes()
    assert execute.main(["--fast", str(path)]) == 0
    assert path.read_bytes() == before


def test_notebook_that_changed_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path, "print(1)")
    executed = notebook("print(2)")
    with pytest.raises(RuntimeError, match="changed while it was running"):
        execute.store(path, executed)
    assert json.loads(path.read_text()) == notebook("print(1)")


def test_library_hash_sees_statements_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ebm_lit"
    package.mkdir()
    (package / "low.py").write_text("def f():\n    return 1\n")
    (package / "high.py").write_text("from .low import f\n")
    (package / "other.py").write_text("")
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    nb = notebook("%matplotlib inline\nfrom ebm_lit.high import f")
    first = execute.library_hash(nb)
    (package / "other.py").write_text("x = 1\n")
    (package / "low.py").write_text('# comment\ndef f():\n    """Doc."""\n\n    return 1  # one\n')
    assert execute.library_hash(nb) == first, "comments, docstrings and strangers do not count"
    (package / "low.py").write_text("def f():\n    return 2\n")
    assert execute.library_hash(nb) != first, "what an imported module imports counts"


def test_large_pictures_are_stored_with_fewer_colours() -> None:
    """Noise in colour shrinks and stays the same picture to the eye; a small picture is not touched."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)

    def png(values: np.ndarray) -> str:
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    large, small = png(pixels), png(pixels[:20, :20])
    slim = execute.slim(large)
    assert execute.slim(small) == small and len(slim) < len(large) / 2
    kept = np.asarray(Image.open(io.BytesIO(base64.b64decode(slim))).convert("RGB")).astype(float)
    assert kept.shape == pixels.shape and np.abs(kept - pixels).mean() < 40
    assert len(np.unique(kept.reshape(-1, 3), axis=0)) <= 64
