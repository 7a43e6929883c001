"""The examples run: a smoke run of each, on sizes of a few seconds, with everything they promise to write."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*arguments, **kwargs):
    command = [sys.executable, str(EXAMPLES / arguments[0]), *map(str, arguments[1:])]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **kwargs)


def test_compare_stiefel_writes_table_json_and_plot(tmp_path):
    result = run("compare_stiefel.py", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "UnitaryLowRankExact" in result.stdout
    recorded = json.loads((tmp_path / "results.json").read_text())
    assert recorded
    assert (tmp_path / "compare_stiefel.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--task", "nothing"], "invalid choice"), (["--steps", "-1"], "--steps"), (["--lr"], "--lr")],
)
def test_compare_stiefel_refuses_wrong_options(arguments, message):
    result = run("compare_stiefel.py", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_pages_show_the_recorded_benchmark(tmp_path):
    pages = [ROOT / "README.md", ROOT / "docs" / "speed.md"]
    copies = [shutil.copy(page, tmp_path) for page in pages]
    record = ROOT / "docs" / "results" / "benchmark.json"
    result = run("benchmark/render.py", record, "--out", tmp_path, "--into", *copies)
    assert result.returncode == 0, result.stderr
    for page, copy in zip(pages, copies, strict=True):
        assert "<!-- benchmark: " in page.read_text()
        assert Path(copy).read_text() == page.read_text()


@pytest.mark.parametrize("section", ["ops", "batch"])
def test_benchmark_checks_times_and_writes(tmp_path, section):
    if not all(importlib.util.find_spec(rival) for rival in ("geotorch", "pogo")):
        pytest.skip("the rivals are not installed (extra `bench`)")
    result = run("benchmark/run.py", "--quick", "--only", section, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "RiemannianSGD D" in result.stdout
    assert json.loads((tmp_path / "benchmark.json").read_text())["cells"]


def test_every_promise_names_tests_that_exist():
    page = (ROOT / "docs" / "promises.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) >= 20
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests" / module).read_text(), f"{module}::{test}"
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert all("::test_" in row for row in rows)


def test_drift_writes_json_and_plot(tmp_path):
    result = run("drift.py", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "drift.json").read_text())["quick"]
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_the_recorded_drift_keeps_its_promises_and_is_what_the_page_shows(tmp_path):
    page = ROOT / "docs" / "upkeep.md"
    copy = shutil.copy(page, tmp_path)
    record = ROOT / "docs" / "results" / "drift.json"
    assert not json.loads(record.read_text())["quick"]
    result = run("drift.py", "--record", record, "--out", tmp_path, "--into", copy)
    assert result.returncode == 0, result.stderr
    assert Path(copy).read_text() == page.read_text()


def test_recurrent_speed_runs_and_the_page_shows_its_record(tmp_path):
    result = run("recurrent_speed.py", "--quick", "--rounds", "1", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "recurrent_speed.json").read_text())["quick"]
    page = ROOT / "docs" / "recurrent.md"
    copy = shutil.copy(page, tmp_path)
    result = run("recurrent_speed.py", "--record", ROOT / "docs" / "results" / "recurrent_speed.json", "--into", copy)
    assert result.returncode == 0, result.stderr
    assert Path(copy).read_text() == page.read_text()
