"""Errors and warnings name what users know: no class of the package's inner modules."""

import ast
import re
from pathlib import Path

import projunn_manifold
from projunn_manifold import layers, optim

PACKAGE = Path(projunn_manifold.__file__).parent
#: Users meet these: the tensor that geoopt's optimisers are handed (it refuses what would lose an update), and the
#: low-rank pair that a sampler of one's own returns.
MET = {"FactoredTensor", "LowRank"}


def inner_names(trees):
    classes = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    public = {*projunn_manifold.__all__, *layers.__all__, *optim.__all__, *projunn_manifold.averaging.__all__}
    return classes - public - MET


def texts_of(tree):
    """Iterate over the literal parts of what is raised, and of what is given to functions that warn or log."""
    for node in ast.walk(tree):
        is_call = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("warn", "info")
        if isinstance(node, ast.Raise) or is_call:
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def slips(trees, sources):
    words = {word for tree in sources for text in texts_of(tree) for word in re.findall(r"\w+", text)}
    return words & inner_names(trees)


def test_no_message_names_an_inner_class():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")]
    assert len(inner_names(trees)) > 30
    assert not slips(trees, trees)
    planted = ast.parse('raise ValueError(f"{x} is no RankOneTangent")\nwarn("a Geometry")')
    assert slips(trees, [planted]) == {"RankOneTangent", "Geometry"}


def test_no_message_names_the_class_of_an_inner_object_or_an_inner_module():
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise | ast.Call):
                text = ast.unparse(node)
                if (isinstance(node, ast.Raise) or "warn" in ast.unparse(node.func)) and "{__name__}" in text:
                    found.append(text)
    assert not found
