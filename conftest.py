"""The Python code blocks of the README and of the documentation are tests: they run as they stand."""

from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

PAGES = ["README.md", "docs/*.md", "docs/*/*.md"]
pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=PAGES).pytest()
