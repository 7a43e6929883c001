"""Examples and benchmarks run: a smoke run of each, of a few seconds, with everything they promise to write."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, page_of, recorded, run_script

pytestmark = pytest.mark.site


def test_the_demo_writes_table_json_and_plot(tmp_path):
    result = run_script("examples/demo.py", "--quick", "--threads", "1", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    record = recorded(tmp_path / "demo.json")
    assert {row["panel"] for row in record["rows"]} == {"rotation", "deep network", "narrow network", "step times"}
    assert all(f"| {row['method']}" in result.stdout for row in record["rows"])
    assert "A smoke run" in result.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--threads", "two"], "--threads"), (["--seed"], "--seed"), (["--lr"], "--lr")]
)
def test_the_demo_refuses_wrong_options(arguments, message):
    result = run_script("examples/demo.py", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.fixture
def demo(monkeypatch):
    """The demo's module, its tasks those of a smoke run."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    threads = torch.get_num_threads()
    module = importlib.import_module("demo")
    small, few = module.panels(True), module.timed(True)
    monkeypatch.setattr(module, "panels", lambda quick: small)
    monkeypatch.setattr(module, "timed", lambda quick: few)
    yield module
    torch.set_num_threads(threads)


def test_the_demo_fails_where_a_claim_fails(demo, tmp_path, capsys):
    assert demo.main(["--threads", "1", "--out", str(tmp_path)]) == 1
    assert "FAILED: narrow network" in capsys.readouterr().out


def test_the_study_of_the_demo_takes_the_rate_of_the_least_loss(demo, tmp_path, monkeypatch):
    panel = demo.panels(True)[-1]
    monkeypatch.setattr(demo, "panels", lambda quick: (panel,))
    assert demo.main(["--study", "--threads", "1", "--out", str(tmp_path)]) == 0
    rates = recorded(tmp_path / "demo_rates.json")["rates"][panel.name]
    assert set(rates) == {recipe.name for recipe in panel.recipes} - {"frozen"}
    for best in rates.values():
        assert best["rate"] == float(min(best["tried"], key=best["tried"].get))


def test_every_recipe_of_the_demo_has_the_best_of_the_rates_that_it_names(demo):
    rates = recorded(demo.RATES)["rates"]
    for panel in demo.panels(False):
        named = {recipe.name: recipe.rates for recipe in panel.recipes if recipe.rates}
        assert set(named) == set(rates[panel.name])
        for name, best in rates[panel.name].items():
            tried = {float(rate): loss for rate, loss in best["tried"].items() if loss is not None}
            assert best["rate"] == min(tried, key=tried.get)
            assert {float(rate) for rate in best["tried"]} == set(named[name])


def rotation(method, reached, seconds, loss):
    curves = [{"seconds": [0.1, seconds / 2, seconds], "loss": [1.0, loss**0.5, loss]}]
    own = {"method": method, "reached": reached, "seconds": seconds, "loss": loss, "curves": curves}
    return {"panel": "rotation", **own}


def network(panel, method, *scores, whole_ms=5.0):
    return {"panel": panel, "method": method, "scores": list(scores), "whole_ms": whole_ms}


def rows_of_a_demo():
    """Rows of a demo whose claims hold."""
    times = (("projUNN-D, k = 1", 4.0), ("Stiefel-euclidean", 300.0), ("Cayley", 200.0))
    return [
        rotation("projUNN-D, k = 1", True, 22.0, 1e-4),
        rotation("projUNN-T, k = 16", True, 6.0, 1e-4),
        rotation("Stiefel-euclidean", False, 25.0, 0.05),
        rotation("Cayley", False, 25.1, 0.4),
        rotation("frozen", False, 1.0, 1.0),
        network("deep network", "projUNN-D, k = 1", 0.91, whole_ms=60),
        network("deep network", "Stiefel-euclidean", 0.915, whole_ms=1000),
        network("deep network", "frozen", 0.92, whole_ms=30),
        network("narrow network", "projUNN-D, k = 4", 0.97, 0.98, 0.99),
        network("narrow network", "projUNN-T, k = 4", 0.96, 0.98, 0.985),
        network("narrow network", "Stiefel-euclidean", 0.975, 0.99, 0.985),
        network("narrow network", "frozen", 0.5, 0.6, 0.7),
        *({"panel": "step times", "method": name, "n": 1024, "whole_ms": ms} for name, ms in times),
    ]


def judged(demo, rows):
    return [(claim.panel, claim.words) for claim in demo.verdict(rows) if not claim.holds]


def test_the_claims_of_the_demo_hold_where_its_rows_say_so(demo):
    assert not judged(demo, rows_of_a_demo())
    assert len(demo.verdict(rows_of_a_demo())) == 3 + 2 + 4 + 1


@pytest.mark.parametrize("panel", ["rotation", "narrow network"])
def test_every_claim_of_learning_fails_for_the_frozen_row(demo, panel):
    rows = rows_of_a_demo()
    (frozen,) = (row for row in rows if row["panel"] == panel and row["method"] == "frozen")
    ours = [row["method"] for row in rows if row["panel"] == panel and row["method"].startswith("projUNN")]
    swapped = [{**frozen, "method": r["method"]} if r["panel"] == panel and r["method"] in ours else r for r in rows]
    claims = [claim for claim in demo.verdict(swapped) if claim.panel == panel]
    assert claims
    assert not any(claim.holds for claim in claims)
    for one in ours:
        swapped = [{**frozen, "method": one} if (r["panel"], r["method"]) == (panel, one) else r for r in rows]
        assert any(one in words for _, words in judged(demo, swapped))


@pytest.mark.parametrize(
    ("place", "change", "panel"),
    [
        (0, {"curves": [{"seconds": [1, 24, 26], "loss": [1.0, 0.006, 1e-4]}]}, "rotation"),
        (1, {"seconds": 9.0}, "rotation"),
        (5, {"scores": [0.9]}, "deep network"),
        (5, {"whole_ms": 130}, "deep network"),
        (8, {"scores": [0.95, 0.96, 0.97]}, "narrow network"),
        (11, {"scores": [0.5, 0.6, 0.965]}, "narrow network"),
        (11, {"scores": [0.9, 0.9, 0.9]}, "narrow network"),
        (12, {"whole_ms": 26.0}, "step times"),
    ],
)
def test_a_claim_fails_with_its_figure(demo, place, change, panel):
    rows = rows_of_a_demo()
    rows[place] = {**rows[place], **change}
    failed = judged(demo, rows)
    assert failed
    assert {name for name, _ in failed} == {panel}


@pytest.mark.parametrize("section", ["ops", "batch"])
def test_benchmark_checks_times_and_writes(tmp_path, section):
    if not all(importlib.util.find_spec(rival) for rival in ("geotorch", "pogo")):
        pytest.skip("the rivals are not installed (extra `bench`)")
    result = run_script("benchmarks/run.py", "--quick", "--only", section, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "RiemannianSGD D" in result.stdout
    assert recorded(tmp_path / "benchmark.json")["cells"]


def test_drift_writes_json_and_plot(tmp_path):
    result = run_script("benchmarks/drift.py", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert recorded(tmp_path / "drift.json")["quick"]
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_explain_draws_the_plane_and_counts_the_passes_of_the_page(tmp_path):
    result = run_script("benchmarks/explain.py", "--side", "256", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    record = recorded(tmp_path / "explain.json")
    theta, angles = torch.tensor(record["angles"]["theta"]), record["angles"]
    assert torch.allclose(torch.tensor(angles["T"]), theta)
    assert torch.allclose(torch.tensor(angles["D"]), theta.atan())
    passes = {name: sum(counts.values()) for name, counts in record["passes"].items()}
    assert passes["torch SGD"] == 3
    assert passes["in place, without numba"] == 6
    assert passes.get("in place", 4) == 4
    for name in ("rotation.png", "passes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_of_concepts_are_drawn_of_what_holds(tmp_path):
    result = run_script("benchmarks/concepts.py", "--steps", "60", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    record = recorded(tmp_path / "concepts.json")
    angles = {letter: torch.tensor(found) for letter, found in record["angles"].items()}
    assert torch.allclose(angles["D"].tan(), angles["T"], atol=1e-6)
    assert (angles["T"].abs() > 1e-6).sum() == 4
    for kept in record["shares"].values():
        assert all(torch.tensor(kept["svd"]).ge(torch.tensor(kept[name]) - 1e-9).all() for name in kept)
    for found in record["errors of a step"].values():
        for letter in ("D", "T"):
            assert all(e <= 50 * max(1, length) for e, length in zip(found[letter], found["length"], strict=True))
    stays = {name for name, off in record["largest errors"].items() if off < 1e-6}
    assert stays == {"optim.RiemannianSGD", "torch's Adam under constrain", "averaging.AveragedModel"}
    for name in ("d_and_t", "samplers", "exactness", "leaving"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_recurrent_speed_runs_and_the_page_shows_its_record(tmp_path):
    result = run_script("benchmarks/recurrent_speed.py", "--quick", "--rounds", "1", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert recorded(tmp_path / "recurrent_speed.json")["quick"]
    page = page_of("recurrent")
    copy = shutil.copy(page, tmp_path)
    result = run_script(
        "benchmarks/recurrent_speed.py", "--record", ROOT / "docs" / "results" / "recurrent_speed.json", "--into", copy
    )
    assert result.returncode == 0, result.stderr
    assert Path(copy).read_text() == page.read_text()


def test_convolution_speed_compares_norms_times_and_writes(tmp_path):
    result = run_script("benchmarks/convolution_speed.py", "--quick", "--rounds", "2", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    cells = recorded(tmp_path / "convolution_speed.json")["cells"]
    assert all("ms" in cell or "not installed" in cell["not_run"] for cell in cells)
    assert len(cells) == 4


def test_a_unitary_network_carries_a_pattern_that_a_plain_one_loses(tmp_path):
    result = run_script("examples/pattern.py", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    networks = recorded(tmp_path / "pattern.json")["networks"]
    assert networks["unitary"]["similarity"][-1] > 0.999
    assert networks["plain, contracting"]["similarity"][-1] < 0.5
    assert networks["plain, expanding"]["similarity"][-1] < 0.5


def test_the_comparison_runs_a_system_or_says_why_not(tmp_path):
    ours = ["projUNN-D, k = 1", "projUNN-T, k = None"]
    systems = [*ours, "Stiefel, canonical (geoopt)", "frozen", "unconstrained", "LSTM"]
    result = run_script(
        "benchmarks/systems.py", "--small", "--seconds", "0.05", "--systems", *systems, "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr
    record = recorded(tmp_path / "compare.json")
    assert len(record["cells"]) == 6 * 6
    ran = [cell for cell in record["cells"] if "not_run" not in cell]
    assert {cell["system"] for cell in ran} == set(systems)
    rates = recorded(ROOT / "docs" / "results" / "compare_rates.json")["rates"]
    assert [cell["rate"] for cell in ran] == [rates[cell["task"]][cell["system"]]["rate"] for cell in ran]
    errors = [cell["unitarity_error"] for cell in ran if cell["system"] in ours]
    assert len(errors) == 2 * 6
    assert max(errors) < 1e-5
    assert all(cell["not_run"] for cell in record["cells"] if cell not in ran)
    assert result.stdout.count("first**: ") == 5  # nobody else here has complex numbers
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def systems(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    yield importlib.import_module("systems")
    torch.set_num_threads(threads)


def test_the_search_takes_the_best_rate_and_keeps_those_of_others(systems, tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "in_processes", lambda function, jobs, count: [function(*job) for job in jobs])
    file = tmp_path / "rates.json"
    for few in (["projUNN-D, k = 1"], ["unconstrained", "LSTM"]):
        command = ["--search", "--small", "--seconds", "0.05", "--tasks", "random unitary", "--systems", *few]
        assert systems.main([*command, "--rates", str(file)]) == 0
    found = recorded(file)["rates"]["random unitary"]
    assert set(found) == {"projUNN-D, k = 1", "unconstrained"}  # an LSTM has no such matrix
    for best in found.values():
        order = {
            float(rate): (tried["solved_after"] is None, tried["solved_after"] or tried["final_loss"])
            for rate, tried in best["tried"].items()
        }
        assert best["rate"] == min(order, key=order.get)


def result_of(name, loss, after=None):
    return {"system": name, "final_loss": loss, "solved_after": after}


@pytest.mark.parametrize(
    ("ours", "other", "says"),
    [
        ((0.1, 2.0), (0.1, 3.0), ["**One of ours is first**: projUNN-D, k = 1 (2 s).", "takes 50 % longer."]),
        ((0.1, 3.0), (0.1, 2.0), ["**None of ours is first**: POGO (pogo-torch) (2 s).", "takes 50 % longer."]),
        ((0.4, None), (0.1, 2.0), ["**None of ours is first**", "k = 1 (loss 0.4), does not reach the goal."]),
        ((0.2, None), (0.3, None), ["**One of ours is first**", "ends with a loss 50 % larger."]),
    ],
)
def test_the_comparison_says_by_how_much_ours_is_first_or_behind(systems, ours, other, says):
    not_run = {"system": "RSDM (Han et al.)", "not_run": "no complex matrices"}
    worse = [result_of("projUNN-T, k = 4", 0.9), result_of("scoRNN (torch, cayley)", 0.9)]
    cells = [not_run, *worse, result_of("POGO (pogo-torch)", *other), result_of("projUNN-D, k = 1", *ours)]
    said = systems.verdict(cells)
    assert all(words in said for words in says), said
    assert "Before" not in said
    fastest = result_of("unconstrained", 0.1, 1.0)
    assert systems.verdict([fastest, *cells]).endswith("without learning an orthogonal matrix: unconstrained (1 s).")


def test_every_system_has_a_searched_rate_wherever_it_runs(systems):
    rates = recorded(systems.RATES_FILE)["rates"]
    for task, setting in systems.SETTINGS.items():
        for name, system in systems.SYSTEMS.items():
            if system.refusal(setting) is None:
                best = rates[task][name]
                assert best["rate"] in {float(rate) for rate in best["tried"]} <= set(system.rates(setting))


def test_a_pretrained_network_is_made_unitary_and_trained_on(tmp_path):
    result = run_script(
        "examples/pretrained.py", "--seeds", "0", "--before", "6", "--epochs", "2", "--layers", "2", "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr
    cells = recorded(tmp_path / "pretrained.json")["cells"]
    assert [cell["name"] for cell in cells] == ["plain", "plain, trained on", "polar", "procrustes", "from scratch"]
    assert all(len(cell["distance"]) == 2 for cell in cells[2:])
    assert cells[3]["accuracy"][0] > cells[4]["accuracy"][0]


def test_the_cost_of_the_exponential_is_measured(tmp_path):
    result = run_script("benchmarks/exponential_speed.py", "--rounds", "3", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(recorded(tmp_path / "exponential_speed.json")["cells"]) == 8


def test_distributed_training_counts_what_travels(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "examples/distributed.py"), "--sizes", "48", "--steps", "6", "--out", str(tmp_path)]
    result = subprocess.run(command + script, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    whole, sketches, _ = recorded(tmp_path / "distributed.json")["cells"]
    assert whole["bytes"] - sketches["bytes"] == 4 * (48 * 48 - 2 * 48)
    assert whole["accuracy"] == sketches["accuracy"]


def test_the_model_of_sharded_steps_is_what_they_cost(tmp_path, monkeypatch):
    result = run_script("benchmarks/sharded.py", "--small", "--sizes", "256", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from sharded import model

    record = recorded(tmp_path / "sharded.json")
    cells = [*record["measured"], *record["simulated"]]
    assert {cell["way"] for cell in cells} == {"matrices", "sketches", "rows"}
    for cell in cells:
        said = model(cell["way"], cell["n"], cell["processes"])
        assert cell["held"] == said["held"]
        assert cell["carried"] == pytest.approx(said["carried"], rel=0.2)
        assert cell["operations"] == pytest.approx(said["operations"], rel=0.3)


def test_steps_have_few_launches(tmp_path):
    result = run_script("benchmarks/launches.py", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    cells = recorded(tmp_path / "launches.json")["cells"]
    found = {(cell["optimizer"], cell["k"], cell["dtype"]): cell["launches"] for cell in cells}
    for dtype in ("float32", "complex64"):
        assert 5 < found["RiemannianSGD, Triton", 1, dtype] <= 25
        assert found["RiemannianSGD, Triton", 1, dtype] < found["RiemannianAdam, Triton", 1, dtype] <= 40
    if shutil.which("g++"):
        assert 5 < found["projunn_t, compiled", 1, "float32"] <= 25
    assert "RiemannianAdam, Triton" in result.stdout
