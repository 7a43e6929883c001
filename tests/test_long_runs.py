"""Drift over 100 000 steps, and 20 000 of training: the curves of ``benchmarks/drift.py``, each within its promise."""

import importlib.util
import sys
from pathlib import Path

import pytest

DRIFT_SCRIPT = Path(__file__).parent.parent / "benchmarks" / "drift.py"


def benchmark():
    spec = importlib.util.spec_from_file_location("drift_benchmark", DRIFT_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


DRIFT = benchmark()
COURSES = [course for course in DRIFT.courses(DRIFT.WALKS, DRIFT.RIVALS, DRIFT.TRAINING) if course.promised]


@pytest.mark.slow
@pytest.mark.parametrize("course", COURSES, ids=lambda course: f"{course.panel}, {course.name}, {course.size}")
def test_a_long_run_stays_within_its_promise(course):
    assert DRIFT.follow(course)["largest"] <= course.promised
