"""The self-test passes where all is well, and says what is off where it is not."""

import json

import pytest
import torch

from projunn_manifold.manifold.unitary import UnitaryLowRank
from projunn_manifold.moves.angle import POLAR
from projunn_manifold.selftest import __main__ as selftest
from projunn_manifold.selftest import laws as all_laws

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # POGO


def run(tmp_path, *arguments):
    file = tmp_path / "selftest.json"
    status = selftest.main(["--device", "cpu", "--quick", "--json", str(file), *arguments])
    return status, json.loads(file.read_text())


def test_all_laws_hold_on_the_cpu(tmp_path, capsys):
    status, record = run(tmp_path)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert record["laws"]
    assert all(law["ok"] for law in record["laws"])
    assert printed.count(": ok") == len(record["laws"])
    assert "OFF" not in printed
    timed = {entry["what"] for entry in record["ms"]}
    assert {"torch SGD", "RiemannianSGD, k = 1", "geoopt EuclideanStiefel", "UnitaryRNN", "OrthogonalConv2d"} <= timed
    assert all(entry["ms"] > 0 for entry in record["ms"])
    assert record["versions"]["torch"] == torch.__version__


def test_a_wrong_map_is_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(all_laws._MAPS, "T", (UnitaryLowRank, all_laws._MAPS["T"][1]))  # D, which is no geodesic
    assert UnitaryLowRank.angle is POLAR
    status, record = run(tmp_path)
    assert status == 1
    off = [law["name"] for law in record["laws"] if not law["ok"]]
    assert off
    assert all(name.startswith("step T") and name.endswith("length 1") for name in off)
    assert "limit" in capsys.readouterr().out


def test_a_law_that_raises_is_off_and_the_others_are_asked(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(all_laws, "_drifted", broken)
    status, record = run(tmp_path)
    assert status == 1
    assert "OFF: RuntimeError: no such kernel" in capsys.readouterr().out
    assert record["laws"][-1]["ok"]


@pytest.mark.parametrize("name", ["xla:0", "no such device"])
def test_a_device_that_is_not_there_is_said_to_be_so(capsys, name):
    try:
        status = selftest.main(["--device", name, "--quick"])
    except SystemExit as stopped:
        status = stopped.code
    assert status
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("where", ["", "missing/selftest.json"])
def test_a_file_that_cannot_be_written_is_refused_at_once(capsys, tmp_path, where):
    with pytest.raises(SystemExit) as stopped:
        selftest.main(["--device", "cpu", "--quick", "--json", str(tmp_path / where)])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert f"argument --json: {tmp_path / where} cannot be written" in said.err
    assert "ok" not in said.out


@pytest.mark.slow
def test_the_whole_of_it_holds_on_the_cpu(tmp_path):
    assert selftest.main(["--device", "cpu", "--json", str(tmp_path / "selftest.json")]) == 0
