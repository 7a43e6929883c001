"""Pages say what their records say, and the tests that they name exist."""

import re
import shutil
from pathlib import Path

import geoopt
import pytest
import torch
from helpers import ROOT, page_of, recorded, run_script

pytestmark = pytest.mark.site


def test_pages_show_the_recorded_benchmark(tmp_path):
    pages = [ROOT / "README.md", page_of("benchmark"), ROOT / "benchmarks" / "bars.md"]
    copies = [shutil.copy(page, tmp_path) for page in pages]
    record = ROOT / "docs" / "results" / "benchmark.json"
    result = run_script("benchmarks/render.py", record, "--out", tmp_path, "--into", *copies)
    assert result.returncode == 0, result.stderr
    for page, copy in zip(pages, copies, strict=True):
        assert "<!-- benchmark: " in page.read_text()
        assert Path(copy).read_text() == page.read_text()


@pytest.mark.parametrize(
    ("name", "least"), [("promises", 20), ("traps", 20), ("upstream", 20), ("comparison", 5), ("companions", 10)]
)
def test_tests_that_pages_name_exist(name, least):
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", page_of(name).read_text())
    assert len(named) >= least
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests" / module).read_text(), f"{module}::{test}"


def test_every_promise_names_a_test():
    page = page_of("promises").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert all("::test_" in row for row in rows)


def test_numbers_that_the_page_of_choices_quotes_are_those_of_the_pages_it_names():
    page = page_of("choosing")
    rows = [line.split(" | ") for line in page.read_text().splitlines() if "](" in line and "|" in line]
    assert len(rows) >= 25
    for _, _, measured, where in rows:
        named = "".join((page.parent / link).read_text() for link in re.findall(r"\(([\w/.]+\.md)[#)]", where))
        for number in re.findall(r"(?<![\w.])\d+\.\d+(?:e[-+]\d+)?|(?<![\w.])\d{3,}(?![\w.])", measured):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", named), f"{number}, {measured}: not in {where}"


def test_the_recorded_drift_keeps_its_promises_and_is_what_the_page_shows(tmp_path):
    page = page_of("drift")
    copy = shutil.copy(page, tmp_path)
    record = ROOT / "docs" / "results" / "drift.json"
    assert not recorded(record)["quick"]
    result = run_script("benchmarks/drift.py", "--record", record, "--out", tmp_path, "--into", copy)
    assert result.returncode == 0, result.stderr
    assert Path(copy).read_text() == page.read_text()


def test_pages_show_the_recorded_experiments(tmp_path):
    results = ROOT / "docs" / "results"
    for script, page, record in (
        ("experiments/render.py", "experiments", [results / "experiments"]),
        ("experiments/pixels_rates.py", "experiments", ["--record", results / "pixels_rates.json"]),
        ("experiments/sampler_study.py", "samplers", ["--record", results / "sampler_study.json"]),
        ("benchmarks/convolution_speed.py", "convolution", ["--record", results / "convolution_speed.json"]),
        ("benchmarks/exponential_speed.py", "convolution", ["--record", results / "exponential_speed.json"]),
        ("examples/pretrained.py", "pretrained", ["--record", results / "pretrained.json"]),
        ("benchmarks/systems.py", "comparison", ["--record", results / "compare.json"]),
        ("examples/distributed.py", "distributed", ["--record", results / "distributed.json"]),
        ("benchmarks/sharded.py", "distributed", ["--record", results / "sharded.json"]),
        ("benchmarks/many_matrices.py", "speed", ["--record", results / "many_matrices.json"]),
        ("benchmarks/launches.py", "speed", ["--record", results / "launches.json"]),
        ("benchmarks/two_threads.py", "benchmark", ["--record", results / "two_threads.json"]),
    ):
        original = page_of(page)
        copy = shutil.copy(original, tmp_path)
        result = run_script(script, *record, "--out", tmp_path, "--into", copy)
        assert result.returncode == 0, result.stderr
        assert Path(copy).read_text() == original.read_text()


def test_geoopts_stiefel_is_what_the_comparison_says():
    for kind in (geoopt.CanonicalStiefel, geoopt.EuclideanStiefel):
        for dtype, fits in ((torch.float32, True), (torch.complex64, False)):
            torch.manual_seed(0)
            start = torch.linalg.qr(torch.randn(3, 6, 4, dtype=dtype))[0]
            w = geoopt.ManifoldParameter(start, manifold=kind())
            optimizer = geoopt.optim.RiemannianSGD([w], lr=0.1)
            try:
                for _ in range(5):
                    optimizer.zero_grad()
                    (w - torch.ones(6, 4)).abs().square().sum().backward()
                    optimizer.step()
                kept = torch.dist(w.mH @ w, torch.eye(4).expand(3, 4, 4)).item() < 1e-4
            except NotImplementedError:
                kept = False
            assert kept is fits
