"""Configuration of the documentation site: sphinx-build -W --keep-going -b html docs docs/_build."""

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "fpq_jax"
author = "the fpq_jax authors"
project_copyright = author
release = version = importlib.metadata.version("fpq-jax")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_parser",
    "command_reference",
]
exclude_patterns = ["_build"]
templates_path: list[str] = []

html_theme = "furo"
html_title = f"fpq_jax {release}"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autosummary_generate = False  # the tables at the top of the API pages; what they list is documented below them
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # of "Attributes:", which a dataclass's fields would otherwise describe a second time
napoleon_attr_annotations = False  # the signature has the types


def _link_files(app: Any, page: str, source: list[str]) -> None:
    """Markdown files outside of docs/ are no pages of the site: links to them are to copies of the files."""
    source[0] = re.sub(r"\]\((?=(\.\./)+benchmarks/)", "](path:", source[0])


def _short_names(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Types by their own names, "Array" and not where it is defined: what is public is then linked, too."""

    def short(text: str | None) -> str | None:
        return text and re.sub(r"~?\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", re.sub(r"<class '([\w.]+)'>", r"\1", text))

    return short(signature), short(returns)


def _no_class_docs(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A constant has no docstring but its class's; the page describes it."""
    if what == "data":
        lines.clear()


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _link_files)
    app.connect("autodoc-process-signature", _short_names)
    app.connect("autodoc-process-docstring", _no_class_docs)
