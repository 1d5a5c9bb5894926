"""Run notebooks from top to bottom in a fresh kernel and store what they printed and drew.

    python nbs/execute.py                          every notebook, in reading order, in full size
    python nbs/execute.py nbs/02_langevin.ipynb    one of them
    python nbs/execute.py --stale                  only those whose stored outputs come from other code
    python nbs/execute.py --check                  run nothing, say which outputs come from other code
    python nbs/execute.py --fast                   shrunken sizes (EBM_LIT_FAST=1), store nothing

A stored notebook carries two hashes in its metadata: one of its own code cells, one of the package modules that it
imports (comments, docstrings and blank lines aside). Its outputs belong to the code beside them when both still match.
What is stored is already as `nbdev_clean` leaves it.
"""

import argparse
import ast
import base64
import hashlib
import io
import json
import os
import re
import sys
import time
import tokenize
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ebm_lit"
LARGE_PNG = 40_000  # characters of base64, above which a stored picture keeps 64 colours
CELL_TIMEOUT = 1800  # seconds; a chapter is meant to take less than two minutes
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PROGRESS_BAR = re.compile(r"\d+%\||\d+it \[|\bit/s\b|\bs/it\b")
ADDRESS = re.compile(r"(<.*?)( at 0x[0-9a-fA-F]+)(>)")  # what nbdev_clean removes from reprs
CELL_FILE = re.compile(r"\S*/ipykernel_\d+/\d+\.py")  # where a kernel pretends that a cell's code lies: new each time

Notebook = dict[str, Any]


def notebooks() -> list[Path]:
    """All notebooks of the project, chapters first, each part in the order of its file names."""
    return sorted((ROOT / "nbs").glob("*.ipynb")) + sorted((ROOT / "nbs").glob("*/*.ipynb"))


def read(path: Path) -> Notebook:
    """The notebook as plain JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(nb: Notebook, path: Path) -> None:
    """Write the notebook the way nbdev does, to a temporary file that then takes the old one's place."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def code_cells(nb: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in nb["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


# Which code do the outputs belong to?


def digest(texts: Iterable[str]) -> str:
    """A hash that also depends on where one text ends and the next begins."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def code_hash(nb: Notebook) -> str:
    """Hash of the sources of the code cells, in order."""
    return digest(source(cell) for cell in code_cells(nb))


def siblings(text: str) -> set[str]:
    """Names of the package's modules that this Python source imports ("__init__" for the package itself)."""
    plain = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in text.splitlines())
    found = set()
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = [PACKAGE] * bool(node.level) + (node.module.split(".") if node.module else [])
            parts = [[*module, alias.name] for alias in node.names] if module == [PACKAGE] else [module]
        else:
            continue
        for part in (p for p in parts if p[0] == PACKAGE):
            is_module = len(part) > 1 and (ROOT / PACKAGE / f"{part[1]}.py").exists()
            found.add(part[1] if is_module else "__init__")
    return found


def statements(text: str) -> str:
    """Python source without comments, docstrings and blank lines: what can change a result."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno:
                lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def library_hash(nb: Notebook) -> str:
    """Hash of the package modules that the notebook imports, directly or through one another."""
    waiting = {name for cell in code_cells(nb) for name in siblings(source(cell))}
    seen: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        file = ROOT / PACKAGE / f"{name}.py"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        seen[name] = statements(text)
        waiting |= siblings(text) - seen.keys()
    return digest(part for name in sorted(seen) for part in (name, seen[name]))


def hashes(nb: Notebook) -> dict[str, str]:
    return {"code_hash": code_hash(nb), "library_hash": library_hash(nb)}


def why_stale(nb: Notebook) -> str | None:
    """One line that says why the stored outputs do not belong to the code; None if they do."""
    stored, now = nb["metadata"].get(PACKAGE, {}), hashes(nb)
    if not stored:
        return "never executed by nbs/execute.py"
    if stored.get("code_hash") != now["code_hash"]:
        return "its code cells have changed since the outputs were stored"
    if stored.get("library_hash") != now["library_hash"]:
        return "a package module that it imports has changed since the outputs were stored"
    return None


# What is stored


def settle(text: str) -> str:
    """Terminal text as it stands in the end: what a carriage return overwrote and progress bars are gone."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return "\n".join(line for line in lines if not PROGRESS_BAR.search(line))


def lines_of(value: Any) -> list[str]:
    text = value if isinstance(value, str) else "".join(value)
    return CELL_FILE.sub("<cell>", ADDRESS.sub(r"\1\3", text)).splitlines(keepends=True)


def slim(png: str) -> str:
    """A large picture (base64 of a PNG file) with at most 64 colours: a fraction of its bytes, hardly another one."""
    if len(png) <= LARGE_PNG:
        return png
    from PIL import Image

    file = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return min(png, base64.b64encode(file.getvalue()).decode(), key=len)


def clean_output(output: dict[str, Any]) -> dict[str, Any] | None:
    """One output as it is stored; None for progress noise and for widgets, which live in a kernel only."""
    if output["output_type"] == "stream":
        text = settle("".join(output["text"]))
        return {"name": output["name"], "output_type": "stream", "text": lines_of(text)} if text.strip() else None
    data = {}
    for mime, value in output["data"].items():
        if mime.startswith("text") or mime == "image/svg+xml":
            data[mime] = lines_of(value)
        elif mime.startswith("image"):
            data[mime] = slim(value.rstrip()) if mime == "image/png" else value.rstrip()
        elif mime != WIDGET_VIEW:
            data[mime] = value
    if not data or (WIDGET_VIEW in output["data"] and set(data) == {"text/plain"}):
        return None
    kept = {"data": data, "metadata": output.get("metadata", {}), "output_type": output["output_type"]}
    return kept | ({"execution_count": None} if output["output_type"] == "execute_result" else {})


def clean_outputs(outputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A cell's outputs as they are stored, neighbouring pieces of one stream joined before they are cleaned."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output["output_type"] == "stream" and last.get("name") == output["name"]:
            joined[-1] = last | {"text": "".join(last["text"]) + "".join(output["text"])}
        else:
            joined.append(dict(output))
    return [cleaned for output in joined if (cleaned := clean_output(output))]


def store(path: Path, executed: Notebook) -> None:
    """Put the outputs into the notebook as it is on disk now, if its code cells are still those that ran."""
    nb = read(path)
    if code_hash(nb) != code_hash(executed):
        raise RuntimeError(f"{path.name} changed while it was running: nothing stored, run it again")
    for cell, ran in zip(code_cells(nb), code_cells(executed), strict=True):
        cell["outputs"], cell["execution_count"], cell["metadata"] = clean_outputs(ran["outputs"]), None, {}
    for cell in nb["cells"]:
        cell.setdefault("id", digest([cell["cell_type"], source(cell)])[:8])
        cell["source"] = source(cell).splitlines(keepends=True)
        cell["metadata"] = {}
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nb["metadata"] = {"kernelspec": kernel, PACKAGE: executed["metadata"][PACKAGE]}
    nb["nbformat"], nb["nbformat_minor"] = 4, 5
    write(nb, path)


# Running


def execute(path: Path, fast: bool = False, extra_cells: Sequence[str] = ()) -> Notebook:
    """Run a copy of the notebook in a fresh kernel of this interpreter and return it with its outputs.

    The working directory is the notebook's folder and the package is this checkout's. `extra_cells` are code cells that
    run after the last one, in the same namespace. Raises `nbclient.exceptions.CellExecutionError` if a cell fails.
    """
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisInterpreter(AsyncKernelManager):
        """Whatever kernels are installed elsewhere, this one is the interpreter that runs this script."""

        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher", "--log-level=40", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="python3", language="python")

    nb = nbformat.read(path, as_version=4)
    nb.metadata[PACKAGE] = hashes(nb)
    nb.cells += [nbformat.v4.new_code_cell(text) for text in extra_cells]
    env = {key: value for key, value in os.environ.items() if key != "EBM_LIT_FAST"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT)] + ([env["PYTHONPATH"]] if env.get("PYTHONPATH") else []))
    if fast:
        env["EBM_LIT_FAST"] = "1"
    client = NotebookClient(
        nb,
        kernel_manager_class=ThisInterpreter,
        timeout=CELL_TIMEOUT,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=env)
    return nb


def stderr_cells(nb: Notebook) -> list[int]:
    """Numbers of the cells that said something on stderr that is not progress: warnings nobody should overlook."""
    return [
        number
        for number, cell in enumerate(nb["cells"])
        if any(output.get("name") == "stderr" for output in clean_outputs(cell.get("outputs", [])))
    ]


def run(path: Path, fast: bool) -> bool:
    """Execute one notebook, store its outputs unless `fast`, and say how it went."""
    from nbclient.exceptions import CellExecutionError

    start = time.perf_counter()
    try:
        nb = execute(path, fast=fast)
        if not fast:
            store(path, nb)
    except (CellExecutionError, RuntimeError, TimeoutError) as error:
        print(f"{path.name}: FAILED after {time.perf_counter() - start:.1f} s\n{error}", flush=True)
        return False
    print(f"{path.name}: {time.perf_counter() - start:.1f} s{'' if fast else ', stored'}", flush=True)
    if noisy := stderr_cells(nb):
        print(f"  note: text on stderr in cells {noisy}", flush=True)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run (default: all)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="run nothing; fail if outputs come from other code")
    mode.add_argument("--stale", action="store_true", help="run only notebooks whose outputs come from other code")
    mode.add_argument("--fast", action="store_true", help="run with EBM_LIT_FAST=1 and store nothing")
    options = parser.parse_args(arguments)
    paths = [path.resolve() for path in options.notebooks] or notebooks()
    if missing := [path for path in paths if not path.is_file()]:
        parser.error(f"no such notebook: {missing[0]}")
    if options.check:
        reasons = {path: reason for path in paths if (reason := why_stale(read(path)))}
        for path, reason in reasons.items():
            print(f"{path.name}: {reason}")
        return int(bool(reasons))
    if options.stale:
        paths = [path for path in paths if why_stale(read(path))]
    results = [run(path, options.fast) for path in paths]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
