"""What is built from the sources installs elsewhere and works there."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

MODULES = """
import importlib, json, pkgutil, sys
import ebm_lit
names = [m.name for m in pkgutil.iter_modules(ebm_lit.__path__) if not m.name.startswith("_")]
for name in names:
    importlib.import_module(f"ebm_lit.{name}")
print(json.dumps({"file": ebm_lit.__file__, "version": ebm_lit.__version__, "modules": names}))
"""
USE = """
import torch
from ebm_lit.data import digits
from ebm_lit.energy import EnergyCNN
from ebm_lit.langevin import Langevin, uniform_init
x, _ = digits("test")
generator = torch.Generator().manual_seed(0)
energy = EnergyCNN(shape=tuple(x.shape[1:]), generator=generator)
start = uniform_init(4, tuple(x.shape[1:]), generator=generator)
langevin = Langevin(step_size=0.01, n_steps=3, temperature=1e-3, bounds=(-1, 1))
sample = langevin.sample(energy, start, generator=generator)
assert sample.shape == (4, 1, 8, 8) and bool(torch.isfinite(sample).all())
"""


def output_of(command: list[str | Path], cwd: Path) -> str:
    """What the command prints; the test fails with all of it if the command does."""
    env = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(copy_tree: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source distribution, itself built from a clean copy of the checkout."""
    sources = copy_tree(tmp_path_factory.mktemp("build") / "sources")
    output_of([sys.executable, "-m", "build", "--no-isolation"], sources)
    (built,) = (sources / "dist").glob("*.whl")
    assert list((sources / "dist").glob("*.tar.gz"))
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a new environment with the wheel in it.

    The requirements are this environment's: a line in a .pth file adds their folder behind the new one, and a folder
    added so brings none of its own .pth files along, so an editable install of the checkout stays outside.
    """
    target = tmp_path_factory.mktemp("environment")
    venv.create(target, with_pip=False)
    scripts = target / ("Scripts" if os.name == "nt" else "bin")
    places = output_of([scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], target)
    ours = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (Path(places.strip()) / "requirements.pth").write_text("\n".join(ours) + "\n")
    output_of(
        [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--no-deps", "--no-index", wheel],
        target,
    )
    return scripts


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    files = (path for path in (root / "ebm_lit").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {path.relative_to(root).as_posix() for path in files}
    assert "ebm_lit/py.typed" in names


def test_wheel_imports_from_an_empty_folder(installed: Path, tmp_path: Path, root: Path) -> None:
    seen = json.loads(output_of([installed / "python", "-c", MODULES], tmp_path))
    assert Path(seen["file"]).is_relative_to(installed.parent), "another installation shadows the wheel"
    assert {"boltzmann", "energy", "langevin", "contrastive_divergence", "training", "cli"} <= set(seen["modules"])
    assert f'__version__ = "{seen["version"]}"' in (root / "ebm_lit" / "__init__.py").read_text()


def test_wheel_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    output_of([installed / "python", "-c", USE], tmp_path)
    assert not list(tmp_path.iterdir()), "using the library left files behind"


def test_command_line_is_installed(installed: Path, tmp_path: Path) -> None:
    text = output_of([installed / "ebm-lit", "--help"], tmp_path)
    for command in ("train", "sample", "energy", "info"):
        assert command in text
    assert not list(tmp_path.iterdir())
