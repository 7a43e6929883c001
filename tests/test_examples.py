"""The examples run: a smoke run of each, on sizes of a few seconds, with everything they promise to write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


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
