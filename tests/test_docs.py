"""The check of the site's links: it passes a sound page and names every kind of fault that is planted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.site

ROOT = Path(__file__).parent.parent
CHECK = ROOT / "docs" / "check_links.py"
SOUND = """<h1 id="top">A</h1><a href="#top">up</a> <a href="b%20c.html?v=1#Z%C3%BCrich">b</a> <a href="#"></a>
<a href="https://example.org/#x">out</a> <img src="data:image/gif;base64,R0lGODlhAQABAAAAACw="> <script src="b.js">"""


def check(folder):
    command = [sys.executable, str(CHECK), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def site(tmp_path):
    (tmp_path / "index.html").write_text(SOUND, encoding="utf-8")
    (tmp_path / "b c.html").write_text('<p id="Zürich">', encoding="utf-8")
    (tmp_path / "b.js").touch()
    return tmp_path


def test_every_module_of_the_package_is_in_the_reference():
    """Except compiled code and the checks of arguments; layers are listed by their names."""
    package = ROOT / "projunn_manifold"
    names = {".".join(file.relative_to(package).with_suffix("").parts) for file in package.rglob("[!_]*.py")}
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    described = set(re.findall(r"automodule:: projunn_manifold\.([\w.]+)", pages))
    by_name = {
        f"layers.{name}" for name in ("conv", "existing", "exponential", "fourier_conv", "linear", "modrelu", "rnn")
    }
    assert names - described == {"linalg.gpu_kernels", "linalg.kernels", "validation"} | by_name
    assert described - names <= {"layers"}


def test_a_sound_site_passes(site):
    result = check(site)
    assert result.returncode == 0, result.stdout
    assert "0 broken links; 1 leave the site" in result.stdout


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ('<a href="../index.html">', "no file ../index.html"),
        ('<a href="index.html#nowhere">', "no anchor index.html#nowhere"),
        ('<a href="#nowhere">', "no anchor #nowhere"),
        ('<img src="lost.png">', "no file lost.png"),
        ('<script src="https://example.org/x.js"></script>', "needs the network for https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "needs the network for //example.org/x.css"),
    ],
)
def test_a_planted_fault_is_named(site, planted, said):
    (site / "planted.html").write_text(planted, encoding="utf-8")
    result = check(site)
    assert result.returncode == 1
    assert f"planted.html: {said}" in result.stdout


def test_an_empty_folder_is_no_site(tmp_path):
    assert check(tmp_path).returncode == 1
