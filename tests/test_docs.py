"""The documentation without Sphinx: every public name is on an API page, links and commands are right."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

import fpq_jax
from fpq_jax import debug

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
API = sorted((DOCS / "api").glob("*.rst"))
PAGES = sorted(path for path in DOCS.rglob("*") if path.suffix in (".md", ".rst") and "_build" not in path.parts)
MARKDOWN = [
    *(path for path in PAGES if path.suffix == ".md"),
    *ROOT.glob("*.md"),
    *(ROOT / "benchmarks").glob("**/README.md"),
]
COMMANDS = ("quantize", "evaluate", "generate", "export")
INCLUDED = {DOCS / "contributing.md": ROOT / "CONTRIBUTING.md", DOCS / "changelog.md": ROOT / "CHANGELOG.md"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A page's text without code and comments."""
    return re.sub(r"```.*?```|`[^`\n]*`|<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The headings of a page as links have them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def documented() -> list[str]:
    """What the API pages describe, with its module."""
    found = []
    for page in API:
        module = ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = f"{match[1]}."
            elif match := re.match(r"\.\. auto(?:class|function|data|exception):: (\S+)", line):
                found.append(match[1] if "." in match[1] else module + match[1])
    return found


def test_the_api_pages_describe_every_public_name_once_and_nothing_else():
    public = [f"fpq_jax.{name}" for name in fpq_jax.__all__] + [f"fpq_jax.debug.{name}" for name in debug.__all__]
    assert sorted(documented()) == sorted(public)


@pytest.mark.parametrize("page", API, ids=name_of)
def test_the_table_of_an_api_page_has_what_the_page_describes(page):
    text = page.read_text(encoding="utf-8")
    table = re.search(r"autosummary::\n   :nosignatures:\n\n((?:   \w+\n)+)", text)
    if table is not None:
        assert table[1].split() == re.findall(r"\.\. auto(?:class|function):: (\S+)", text)


@pytest.mark.parametrize("page", MARKDOWN, ids=name_of)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_file(), f"{target} is not there"
        assert not anchor or anchor in anchors(INCLUDED.get(path, path)), f"{target}: no such heading"


@pytest.mark.parametrize("page", API, ids=name_of)
def test_links_of_api_pages_resolve(page):
    for target in re.findall(r":doc:`([^`]+)`", page.read_text(encoding="utf-8")):
        assert (page.parent / f"{target}.md").is_file(), target


def test_every_page_is_in_one_table_of_contents():
    listed = [DOCS / "index.md"]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        trees = re.findall(r"```\{toctree\}\n(.*?)```", text, flags=re.DOTALL)
        trees += re.findall(r"\.\. toctree::\n((?:   .*\n|\n)+)", text)
        for entry in re.findall(r"^ *([\w/]+)$", "\n".join(trees), flags=re.MULTILINE):
            (found,) = (path for s in (".md", ".rst") if (path := page.parent / f"{entry}{s}").is_file())
            listed.append(found)
    assert sorted(listed) == PAGES


def test_each_command_has_a_page():
    assert {page.stem for page in (DOCS / "commands").glob("*.md")} == {*COMMANDS, "index"}
    for name in COMMANDS:
        assert f"```{{command}} {name}\n```" in (DOCS / "commands" / f"{name}.md").read_text(encoding="utf-8")


def test_flags_exist():
    """In each ``python -m fpq_jax.NAME ...`` of any page."""
    flags = {
        name: {"--" + f.name.replace("_", "-") for f in dataclasses.fields(module.Options)} | {"--help"}
        for name in COMMANDS
        if (module := importlib.import_module(f"fpq_jax.{name}"))
    }
    seen = 0
    for page in MARKDOWN:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, rest in re.findall(r"-m fpq_jax\.(\w+)([^`\n#]*)", text):
            if name in COMMANDS:
                unknown = set(re.findall(r"--[\w-]+", rest)) - flags[name]
                assert not unknown, f"{page}: {name} has no {unknown}"
                seen += 1
    assert seen > 20


def test_names_of_the_package_in_python_snippets_exist():
    for page in MARKDOWN:
        if page.name == "CHANGELOG.md":
            continue
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\bfpq\.(\w+)", text):
            files = ("json", "lock", "safetensors")  # fpq.json is no name in Python
            assert name in (*fpq_jax.__all__, *files), f"{page}: fpq.{name}"
        for name in re.findall(r"\bfpq_jax\.debug\.(\w+)", text):
            assert name in debug.__all__, f"{page}: fpq_jax.debug.{name}"


def test_the_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([\w./]+/[\w./]+)`", text) if "NAME" not in name}
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists(), name


def test_contributing_has_the_floors_of_the_tree():
    from test_floors import FLOORS

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([1-6]) \| (`[^|]+`) \|", text, flags=re.MULTILINE)
    assert {(int(floor), room) for floor, rooms in rows for room in re.findall(r"\w+", rooms)} == {
        (i, room) for i, rooms in enumerate(FLOORS, 1) for room in rooms
    }


def test_the_readme_is_short_and_has_one_command_for_the_tests():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    assert text.count("python -m pytest") == 1
