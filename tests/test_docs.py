"""The reference says what the docstrings say, and the examples in them are true."""

from __future__ import annotations

import doctest
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest

import easgd_local as easgd

DOCS = Path(__file__).parents[1] / "docs"
WITH_EXAMPLES = ("batches", "calibrate", "centers", "rules.elastic", "theory.stability")


def test_the_reference_is_up_to_date():
    page = runpy.run_path(str(DOCS / "make_reference.py"))["page"]()
    assert (DOCS / "reference.md").read_text("utf-8") == page, "run python docs/make_reference.py"


def test_every_public_name_is_in_the_reference_with_its_docstring():
    text = (DOCS / "reference.md").read_text("utf-8")
    for name in set(easgd.__all__) - {"__version__", "theory", "Rule"}:
        assert re.search(rf"^### `(easgd_local\.)?{name}`", text, re.MULTILINE), name
        first_line = (getattr(easgd, name).__doc__ or "").strip().splitlines()[0]
        assert first_line in text, name


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_in_docstrings_are_true(module):
    failed, tried = doctest.testmod(import_module(f"easgd_local.{module}"))
    assert tried and not failed


@pytest.mark.parametrize("page", ["library.md", "reference.md"])
def test_links_between_the_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (DOCS / page).read_text("utf-8")):
        assert (DOCS / target).exists(), target


def test_the_guide_names_only_what_there_is():
    for name in re.findall(r"easgd\.([A-Za-z_]+)", (DOCS / "library.md").read_text("utf-8")):
        assert hasattr(easgd, name), name
