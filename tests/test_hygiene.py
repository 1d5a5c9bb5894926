"""Notebooks, package, site and documents are in step, and keep the project's own rules."""

import ast
import configparser
import importlib
import importlib.metadata
import inspect
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import execute
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ebm_lit"
MODULES = sorted(path.stem for path in (ROOT / PACKAGE).glob("*.py") if not path.stem.startswith("_"))
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in execute.notebooks()]

# Who may import whom. This is the design: change it here, in CONTRIBUTING.md and in the chapters together.
ARROWS = {
    "boltzmann": set(),
    "energy": set(),
    "data": set(),
    "plotting": set(),
    "fast": {"energy"},
    "langevin": {"energy", "fast"},
    "contrastive_divergence": {"energy", "langevin"},
    "training": {"contrastive_divergence", "energy", "fast", "langevin"},
    "evaluation": {"boltzmann", "energy", "langevin"},
    "pretrained": {"energy", "evaluation", "training"},
    "widgets": {"boltzmann", "langevin", "plotting"},
    "cli": set(MODULES) - {"cli"},
}
FLIP_BOOKS = ("00_boltzmann", "02_langevin", "03_contrastive_divergence", "04_training", "05_mnist")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS)
every_module = pytest.mark.parametrize("name", MODULES)


def python(code: str, cwd: Path) -> str:
    """Run Python code in a folder; the test fails with what it said if it fails."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def tracked() -> list[Path]:
    """Every file of the project that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def markdown_cells(path: Path) -> list[str]:
    return [execute.source(cell) for cell in execute.read(path)["cells"] if cell["cell_type"] == "markdown"]


def text_of(output: dict[str, Any]) -> str:
    """All text of an output, pictures left out."""
    parts = [output.get("text", "")]
    parts += [value for mime, value in output.get("data", {}).items() if mime.startswith("text/")]
    return "\n".join("".join(part) for part in parts)


def html_of(output: dict[str, Any]) -> str:
    return "".join(output.get("data", {}).get("text/html", ""))


def without_code(text: str) -> str:
    """Markdown without fenced and inline code."""
    text = re.sub(r"^ *(`{3,}|~{3,}).*?^ *\1[ \t]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "CODE", text)


def without_maths(text: str) -> str:
    """Markdown without `$$…$$` and `$…$`."""
    text = re.sub(r"\$\$.*?\$\$", "MATHS", text.replace(r"\$", ""), flags=re.DOTALL)
    return re.sub(r"\$(?=\S)[^$]*?(?<=\S)\$", "MATHS", text)


# Notebooks and package


def test_package_is_what_the_notebooks_export(tree: Path) -> None:
    """`nbdev_export` in a clean copy changes nothing."""
    before = {path.name: path.read_text() for path in (tree / PACKAGE).glob("*.py")}
    python("from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()", tree)
    after = {path.name: path.read_text() for path in (tree / PACKAGE).glob("*.py")}
    assert sorted(before) == sorted(after)
    for name, text in after.items():
        assert before[name] == text, f"{name} is not what its notebook exports: run nbdev_export"


def test_every_module_has_its_notebook() -> None:
    exports = {}
    for path in execute.notebooks():
        for cell in execute.code_cells(execute.read(path)):
            if found := re.match(r"#\|\s*default_exp\s+(\w+)\s*$", execute.source(cell)):
                exports[found[1]] = path
    assert sorted(exports) == MODULES
    for name, path in exports.items():
        assert path.stem.lstrip("0123456789_") == name, f"{path.name} exports {name}"


@every_notebook
def test_stored_outputs_belong_to_the_committed_code(path: Path) -> None:
    reason = execute.why_stale(execute.read(path))
    assert reason is None, f"{path.name}: {reason}: run nbs/execute.py"


def test_notebooks_are_clean(tree: Path) -> None:
    """`nbdev_clean` changes nothing."""
    before = {path: path.read_bytes() for path in (tree / "nbs").rglob("*.ipynb")}
    python("from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()", tree)
    for path, content in before.items():
        assert path.read_bytes() == content, f"{path.name} is not clean: run nbdev_clean"


@every_notebook
def test_notebook_keeps_the_rules(path: Path) -> None:
    nb = execute.read(path)
    first, codes = nb["cells"][0], [execute.source(cell) for cell in execute.code_cells(nb)]
    assert first["cell_type"] == "markdown"
    assert re.fullmatch(r"# \S[^\n]*\n+> \S[^\n]*\n?", execute.source(first)), "first cell: title and subtitle only"
    if any("#| export" in code for code in codes):
        assert re.fullmatch(r"#\| default_exp \w+", codes[0]), "the first code cell is default_exp, alone"
    lines = [line for code in codes for line in code.splitlines() if not line.startswith("#|")]
    assert [line for line in lines if len(line) > 120] == [], "code stays within 120 characters a line"
    ids = [cell["id"] for cell in nb["cells"]]
    assert len(ids) == len(set(ids)), "cell ids are unique"
    assert path.stat().st_size < 1_000_000, "under 1 MB"


@every_notebook
def test_stored_outputs_are_presentable(path: Path) -> None:
    nb = execute.read(path)
    outputs = [output for cell in execute.code_cells(nb) for output in cell["outputs"]]
    assert outputs, "no stored outputs"
    for output in outputs:
        assert output["output_type"] != "error", "an uncaught error is stored"
        assert output.get("name") != "stderr", f"a warning is stored: {text_of(output)}"
        assert execute.WIDGET_VIEW not in output.get("data", {}), "a widget without a kernel shows nothing"


@every_notebook
def test_figures_have_alternative_text(path: Path) -> None:
    for cell in execute.code_cells(execute.read(path)):
        code = execute.source(cell)
        if any(mime.startswith("image/") for output in cell["outputs"] for mime in output.get("data", {})):
            assert re.search(r'^#\|\s*fig-alt:\s*"?\w.{10,}', code, re.MULTILINE), f"a figure without fig-alt:\n{code}"
        for tag in re.findall(r"<img\b[^>]*>", "".join(html_of(output) for output in cell["outputs"])):
            assert re.search(r"""\balt=(["'])(?!\1).+?\1""", tag, re.DOTALL), f"<img> without alt in:\n{code}"
    for text in markdown_cells(path):
        assert not re.search(r"!\[\s*\]\(", text), f"a picture without alternative text: {text}"


@pytest.mark.parametrize("stem", FLIP_BOOKS)
def test_chapter_has_a_flip_book(stem: str) -> None:
    cells = execute.code_cells(execute.read(ROOT / "nbs" / f"{stem}.ipynb"))
    players = [html for cell in cells for output in cell["outputs"] if 'type="range"' in (html := html_of(output))]
    assert players, "no flip-book among the stored outputs"


@every_notebook
def test_markdown_stays_in_the_common_subset(path: Path) -> None:
    for text in markdown_cells(path):
        plain = without_code(text)
        assert ":::" not in plain, f"a Pandoc block: {text}"
        assert not re.search(r"(?<![\w`])@(fig|tbl|sec|eq)-", plain), f"a cross-reference only Quarto knows: {text}"
        assert plain.count("$$") % 2 == 0, f"unbalanced $$: {text}"
        for block in re.findall(r"\$\$.*?\$\$", plain, flags=re.DOTALL):
            assert "\n\n" not in block, f"a blank line inside a formula: {block}"
        rest = without_maths(plain)
        assert "$" not in rest, f"an unbalanced $: {[line for line in rest.splitlines() if '$' in line]}"
        tags = set(re.findall(r"</?([a-zA-Z][a-zA-Z0-9]*)\b[^>\n]*>", rest))
        assert tags <= {"details", "summary"}, f"HTML that not every reader shows: {tags}"
        for opening in re.findall(r"<summary>.*?</summary>([^\n]*\n[^\n]*)", text):
            assert not opening.strip(), "a blank line belongs after </summary>"


# The site


def sidebar_entries(contents: list[Any]) -> Iterator[str]:
    for item in contents:
        if isinstance(item, str):
            yield item
        elif "contents" in item:
            yield from sidebar_entries(item["contents"])
        else:
            yield item["href"]


def test_site_lists_every_notebook_in_reading_order() -> None:
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    listed = list(sidebar_entries(site["website"]["sidebar"]["contents"]))
    assert [entry for entry in listed if not (ROOT / entry).exists()] == []
    notebooks = [path.relative_to(ROOT).as_posix() for path in execute.notebooks()]
    assert sorted(entry for entry in listed if entry.endswith(".ipynb")) == sorted(notebooks)
    chapters = [entry for entry in listed if re.match(r"nbs/\d", entry)]
    assert chapters == sorted(chapters)
    rendered = {path.relative_to(ROOT).as_posix() for glob in site["project"]["render"] for path in ROOT.glob(glob)}
    assert set(listed) <= rendered
    navbar = site["website"]["navbar"]
    links = [item["href"] for side in ("left", "right") for item in navbar[side]]
    assert [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()] == []
    assert site["execute"] == {"enabled": False}


def test_site_sources_are_processed_by_nbdev(tree: Path) -> None:
    """What `nbdev_docs` does before Quarto takes over, and without it."""
    python("import nbdev.quarto as q; q._ensure_quarto = lambda: None; q.nbdev_proc_nbs.__wrapped__()", tree)
    for path in execute.notebooks():
        name = path.relative_to(ROOT)
        processed = json.loads((tree / "_proc" / name).read_text())
        front = "".join(processed["cells"][0]["source"])
        title = execute.source(execute.read(path)["cells"][0]).splitlines()[0].removeprefix("# ")
        assert title in yaml.safe_load(front.strip().strip("-"))["title"], f"{name}: the page has lost its title"
    assert (tree / "_proc" / "_quarto.yml").exists() and (tree / "_proc" / "nbdev.yml").exists()


@pytest.mark.skipif(shutil.which("quarto") is None, reason="Quarto is not installed")
def test_site_renders(tree: Path) -> None:
    said = python("from nbdev.quarto import nbdev_docs; nbdev_docs.__wrapped__()", tree)
    assert "WARN" not in said, said
    for path in [ROOT / "index.qmd", *execute.notebooks()]:
        page = (tree / "_docs" / path.relative_to(ROOT)).with_suffix(".html")
        assert page.exists(), f"{page.name} was not rendered"


# Documents


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def page_text(path: Path) -> str:
    return "\n\n".join(markdown_cells(path)) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


PAGES = [path for path in tracked() if path.suffix in {".md", ".qmd", ".ipynb"}]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_internal_links_resolve(path: Path) -> None:
    plain = without_code(page_text(path))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", plain) + re.findall(r"\b(?:src|href)=[\"']([^\"']+)", plain)
    targets += re.findall(r"\{\{< include (\S+) >\}\}", plain)
    for target in targets:
        if re.match(r"[a-z]+:", target) or target.startswith("attachment:"):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{target} leads nowhere"
        if anchor and place.suffix in {".md", ".qmd", ".ipynb"}:
            headings = re.findall(r"^#+ +(.+?) *#*$", without_code(page_text(place)), re.MULTILINE)
            raw = re.findall(r"^#+ +(.+?) *#*$", page_text(place), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings + raw}, f"{target}: no such heading"


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    places = "|".join(["/" + "home/", "/" + "Users/", "/" + "root/", "/" + "tmp/", r"[A-Z]:\\" + "Users"])
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path.suffix == ".ipynb":
            nb = execute.read(path)
            parts = [execute.source(cell) for cell in nb["cells"]]
            parts += [text_of(output) for cell in execute.code_cells(nb) for output in cell["outputs"]]
            text = re.sub(r"base64,[\w+/=]+", "", "\n".join(parts))
        found = re.search(rf"(?<![\w.~])(?:{places})\S*", text)
        assert not found, f"{path.relative_to(ROOT)}: {found and found[0]}"


def test_version_is_the_same_everywhere() -> None:
    version = settings()["version"]
    assert importlib.import_module(PACKAGE).__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version


def test_address_is_the_same_everywhere() -> None:
    cfg = settings()
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    hrefs = [item["href"] for item in site["website"]["navbar"]["right"]]
    assert cfg["git_url"] in hrefs and citation["repository-code"] == cfg["git_url"]
    on_colab = cfg["git_url"].replace("https://github.com", "https://colab.research.google.com/github")
    assert f"{on_colab}/blob/{cfg['branch']}/" in hrefs
    assert citation["url"].rstrip("/") == cfg["doc_host"] + cfg["doc_baseurl"]


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    commands = (ROOT / ".ci" / "run").read_text().rstrip().splitlines()
    assert commands[-1].endswith("-m pytest")
    fenced = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert commands[-1] in [line.strip() for block in fenced for line in block.splitlines()]


def test_names_in_the_documents_examples_exist() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for code in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
                    module = importlib.import_module(node.module)
                    missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                    assert not missing, f"{path.name} imports {missing} from {node.module}"


def test_workflows_are_well_formed() -> None:
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        for job in workflow["jobs"].values():
            assert job["runs-on"] and all("run" in step or "uses" in step for step in job["steps"])


# The code


def imports(name: str) -> set[str]:
    """Dotted names of everything that a module of the package imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(f"{PACKAGE}.{node.module}" if node.level else node.module)
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{PACKAGE}.{alias.name}" for alias in node.names}
    return found


@every_module
def test_import_arrows_are_those_of_the_design(name: str) -> None:
    ours = {part.split(".")[1] for part in imports(name) if part.startswith(f"{PACKAGE}.")}
    assert PACKAGE not in imports(name), "a module imports from a module, not from the package"
    ours.discard("__version__")
    assert ours <= ARROWS[name], f"{name} may not import {sorted(ours - ARROWS[name])}"


@every_module
def test_matplotlib_is_imported_in_plotting_and_widgets_only(name: str) -> None:
    drawn = any(part.split(".")[0] in {"matplotlib", "mpl_toolkits"} for part in imports(name))
    assert not drawn or name in {"plotting", "widgets"}


def test_requirements_are_exactly_what_the_package_imports() -> None:
    used = {part.split(".")[0] for name in [*MODULES, "__init__"] for part in imports(name)}
    used -= {PACKAGE, *sys.stdlib_module_names}
    offered = set()
    for item in settings()["requirements"].split():
        files = importlib.metadata.files(re.split(r"[<>=!~\[;]", item)[0]) or []
        names = {file.parts[0].removesuffix(".py") for file in files if file.suffix == ".py"}
        assert names & used, f"{item} is required and never imported"
        offered |= names
    assert used <= offered, f"imported and not required: {sorted(used - offered)}"


def public_objects(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Every public function and class of a module, and the methods with which a class adds to its bases."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and get_origin(value) is None:  # Python 3.10 takes Callable[…] for a class
            yield name, value
            own = {key: member for key, member in vars(value).items() if not hasattr(super(value, value), key)}
            for key, member in own.items():
                inner = member.__func__ if isinstance(member, staticmethod | classmethod) else member
                inner = inner.fget if isinstance(inner, property) else inner
                if inspect.isfunction(inner) and inner.__module__ == module.__name__ and not key.startswith("_"):
                    yield f"{name}.{key}", inner


@every_module
def test_public_names_are_declared_and_documented(name: str) -> None:
    module = importlib.import_module(f"{PACKAGE}.{name}")
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [public for public in module.__all__ if public.startswith("_")]
    for label, value in public_objects(module):
        text = inspect.cleandoc(value.__doc__ or "")
        assert text and not text.startswith(f"{label}("), f"{name}.{label} has no docstring of its own"
        assert re.match(r"[^\n]{5,}[.:?!](\s|$)", text), f"{name}.{label}: the docstring begins with a sentence: {text}"


@every_module
def test_every_signature_is_typed(name: str) -> None:
    """All of them, private ones too."""
    tree = ast.parse((ROOT / PACKAGE / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            bare = [arg.arg for arg in given if arg and not arg.annotation and arg.arg not in {"self", "cls"}]
            assert not bare, f"{name}.{node.name}: {bare} without a type"
            assert node.returns or node.name == "__init__", f"{name}.{node.name} without a return type"


@pytest.mark.parametrize("command", [["ruff", "check"], ["mypy"]], ids=lambda command: command[0])
def test_linters_find_nothing(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_is_cheap() -> None:
    """`import ebm_lit` costs at most 0.3 s over `import torch`: median of seven fresh interpreters.

    The two imports are timed one after the other in the same interpreter, so both see the machine in the same mood.
    """
    code = f"import time, torch; start = time.perf_counter(); import {PACKAGE}; print(time.perf_counter() - start)"
    python(code, ROOT)  # compiles and warms the file cache
    seconds = [float(python(code, ROOT)) for _ in range(7)]
    assert statistics.median(seconds) <= 0.3, f"seconds: {seconds}"


def test_import_leaves_heavy_parts_alone() -> None:
    """Optional parts are imported where they are used, which the clock alone would not show on a fast machine."""
    heavy = ["matplotlib", "torchvision", "sklearn", "ipywidgets", "IPython", "PIL"]
    assert python(f"import sys, {PACKAGE}; print([n for n in {heavy} if n in sys.modules])", ROOT).strip() == "[]"
