"""What is published: the wheel holds the package, its types and its licence, the sdist what tests and pages need."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import page_of

from projunn_manifold import __version__

ROOT = Path(__file__).parent.parent
NAME = f"projunn_manifold-{__version__}"
PACKAGE = {file.relative_to(ROOT).as_posix() for file in (ROOT / "projunn_manifold").rglob("*.py")}
PACKAGE.add("projunn_manifold/py.typed")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_wheel_holds_the_package_alone(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        info = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
        assert set(wheel.namelist()) == PACKAGE | info


def test_the_sdist_holds_the_sources_and_nothing_built(built):
    """Sources are told by their suffixes; pages need their pictures, and tests of pages the records."""
    with tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        sizes = {member.name.removeprefix(f"{NAME}/"): member.size for member in sdist.getmembers()}
    folders = ("docs", "examples", "experiments", "benchmarks", "tests")
    kept = {file for folder in folders for file in (ROOT / folder).rglob("*.*")}
    sources = {file for file in kept if file.suffix in {".py", ".md", ".rst", ".json", ".png", ".css", ".toml"}}
    names = {file.relative_to(ROOT) for file in sources}
    generated = {("docs", "_build"), ("docs", "gallery"), ("docs", "tutorials")}
    expected = {name.as_posix() for name in names if name.parts[:2] not in generated}
    beside = "CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE Makefile README.md conftest.py constraints.txt"
    written = {".gitignore", "PKG-INFO", "pyproject.toml"}  # hatchling adds these
    assert set(sizes) == PACKAGE | expected | set(beside.split()) | written
    assert max(sizes.values()) < 600 * 1024


def test_the_citation_names_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{__version__}}}" in page_of("citing").read_text()
