"""The package: who may import whom, how long a chain of imports gets, where PyTorch's private names are."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import projunn_manifold

PACKAGE = Path(projunn_manifold.__file__).parent
#: From the bottom to the top: no module imports one that stands after it.
ORDER = [
    "context", "reference", "linalg", "validation", "init", "sketching", "moves", "manifold", "optim", "averaging",
    "inspection", "layers", "pretrained", "distributed", "selftest",
]  # fmt: skip
LONGEST = 12
MOST_FILES = 14


def modules():
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = file
    return found


def imports(source, known):
    """Names of this package's modules that a source imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "projunn_manifold":
            base = ".".join(node.module.split(".")[1:])
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield inner if inner in known else base
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("projunn_manifold"))


def upward(name, source, known):
    """Imports of a module that stands after this one in the order."""
    place = {folder: rank for rank, folder in enumerate(ORDER)}
    own = place.get(name.split(".")[0], len(ORDER))
    return [other for other in imports(source, known) if place.get(other.split(".")[0], len(ORDER)) > own]


def test_no_module_imports_one_that_stands_above_it():
    known = modules()
    assert {name.split(".")[0] for name in known} - {""} == set(ORDER)
    found = {name: upward(name, file.read_text(), known) for name, file in known.items() if name}
    assert not {name: others for name, others in found.items() if others}


@pytest.mark.parametrize(
    "line", ["from projunn_manifold.layers import linear", "import projunn_manifold.manifold.unitary"]
)
def test_an_import_the_wrong_way_is_found(line):
    known = modules()
    source = known["moves.move"].read_text()
    assert not upward("moves.move", source, known)
    assert upward("moves.move", f"{source}\ndef late():\n    {line}\n", known)


def test_the_longest_chain_of_imports_is_short():
    known = modules()

    @functools.cache
    def chain(name):
        others = set(imports(known[name].read_text(), known)) - {name, ""}
        return [name, *max((chain(other) for other in others), key=len, default=[])]

    read = [name for name in known if not name.startswith("selftest")]  # a program on top of all
    assert len(longest := max(map(chain, read), key=len)) <= LONGEST, longest


def test_no_folder_is_crowded():
    folders = [PACKAGE, *(folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists())]
    assert {
        folder.name: len(list(folder.glob("*.py"))) for folder in folders if len(list(folder.glob("*.py"))) > MOST_FILES
    } == {}


def test_private_names_of_pytorch_have_one_home():
    private = re.compile(r"\btorch(\.\w+)*\._(?!_)\w+|\b_pytree\b|forward_ad\b|_are_functorch|register_optimizer_step")
    for name, file in modules().items():
        for line in file.read_text().splitlines():
            if name != "context" and "context.register" not in line:
                assert not private.search(line), f"{name}: {line.strip()}"


def test_importing_changes_nothing():
    """No hook on optimisers, no import of torch._dynamo or numba, nothing at fork, until a manifold is made."""
    program = """
import os, sys, torch, geoopt
import torch.optim.optimizer as optimizer
forks = []
os.register_at_fork = lambda **functions: forks.append(functions)
hooks = lambda: (len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks))
before, dynamo = hooks(), "torch._dynamo" in sys.modules
import projunn_manifold
assert hooks() == before, hooks()
assert ("torch._dynamo" in sys.modules) == dynamo
assert "numba" not in sys.modules
assert not forks
projunn_manifold.UnitaryLowRank(1)
assert hooks() == (before[0] + 1, before[1] + 1), hooks()
projunn_manifold.UnitaryLowRank(1)
assert hooks() == (before[0] + 1, before[1] + 1), hooks()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
