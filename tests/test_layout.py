"""The three folders make one package, in a checkout and installed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = SETTINGS["package-dir"]


def folders_found() -> dict[str, str]:
    """Package names by what lies in the folders, without following the links."""
    tops = {"cellc": "cellc", "kernels": "cellc.kernels", "frontends": "cellc.frontends"}
    found = {}
    for folder, package in tops.items():
        for marker in (ROOT / folder).glob("**/__init__.py"):
            below = marker.parent.relative_to(ROOT / folder)
            if not any((ROOT / folder / part).is_symlink() for part in below.parts[:1]):
                found[".".join([package, *below.parts])] = str(Path(folder) / below)
    return found


def test_package_list_matches_folders() -> None:
    assert sorted(SETTINGS["packages"]) == sorted(folders_found())


def test_package_dir_matches_folders() -> None:
    assert FOLDERS == folders_found()


@pytest.mark.parametrize("name", ["kernels", "frontends"])
def test_link_resolves(name: str) -> None:
    link = ROOT / "cellc" / name
    assert link.is_symlink()
    assert not Path(link.readlink()).is_absolute()
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("package", SETTINGS["packages"])
def test_package_has_its_files(package: str) -> None:
    """Every module and data file of the checkout is in the package that is imported."""
    module = importlib.import_module(package)
    assert module.__file__ is not None
    installed = {p.name for p in Path(module.__file__).parent.iterdir() if p.is_file()}
    expected = {
        p.name
        for p in (ROOT / FOLDERS[package]).iterdir()
        if p.suffix in (".py", ".h", ".cpp", ".typed")
    }
    assert expected <= installed


@pytest.mark.parametrize("name", ["kernels", "frontends"])
def test_bare_name_is_refused_with_guidance(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "ImportError" in run.stderr
    assert f"import cellc.{name}" in run.stderr


def test_package_is_typed() -> None:
    module = importlib.import_module("cellc")
    assert module.__file__ is not None
    assert (Path(module.__file__).parent / "py.typed").is_file()
