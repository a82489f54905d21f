"""Docstrings of the public names: Google style, complete, and with examples that run."""

import dataclasses
import doctest
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpq_jax as fpq
import fpq_jax.debug
from fpq_jax._numerics import formats

PUBLIC = {f"{module.__name__}.{name}": getattr(module, name) for module in (fpq, fpq.debug) for name in module.__all__}
CONSTANTS = [name for name, value in PUBLIC.items() if isinstance(value, fpq.Format)]
NAMES = [name for name in PUBLIC if name not in CONSTANTS]
CLASSES = [name for name, value in PUBLIC.items() if inspect.isclass(value)]
HOPPER = ("fpq_jax.debug.compile_for_hopper", "fpq_jax.debug.hopper")  # compile for an H100
PROPERTIES = (property, functools.cached_property)
HEADING = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example):")


def sections(doc):
    """The lines of each section by its heading; what is in front of the first is under ""."""
    parts, current = {"": []}, ""
    for line in inspect.cleandoc(doc).splitlines():
        if heading := HEADING.fullmatch(line):
            current = heading[1]
            assert current not in parts, f"two sections {current}"
            parts[current] = []
        else:
            parts[current].append(line)
    return parts


def items(lines):
    """The names that a section has texts for."""
    return [found[1] for line in lines if (found := re.match(r" {4}(\S+): \S", line))]


def has_type(line):
    """Whether Sphinx's napoleon takes what is in front of a colon for a type: of a result, a property or a constant."""
    return ":" in re.sub("``.*?``", "", line)


def check_first_line(doc, *, verb):
    assert doc, "there is no docstring"
    first = doc.splitlines()[0]
    assert first.endswith(".") and len(first) <= 120, first
    assert not verb or re.match(r"[A-Z][a-z]+s ", first), f"no verb comes first: {first}"


def check_function(function, doc):
    """First line, and sections for all parameters, for the result and for what the body raises."""
    check_first_line(doc, verb=True)
    function, found = inspect.unwrap(function), sections(doc)
    signature = inspect.signature(function)
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    wanted = [stars.get(p.kind, "") + p.name for p in signature.parameters.values() if p.name not in ("self", "cls")]
    assert items(found.get("Args", [])) == wanted
    result = "Yields" if inspect.isgeneratorfunction(function) else "Returns"
    assert (result in found) == (signature.return_annotation is not None)
    assert not has_type(found.get(result, [""])[0])
    assert "raise FpqError" not in inspect.getsource(function) or "FpqError" in items(found.get("Raises", []))


def methods(cls):
    """Public methods of a class's own, without classmethod, and the documented __call__."""
    own = {n: getattr(v, "__func__", v) for n, v in vars(cls).items() if n == "__call__" or not n.startswith("_")}
    return {name: value for name, value in own.items() if inspect.isfunction(value)}


def fields(cls):
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(getattr(cls, "_fields", ()))


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    value = PUBLIC[name]
    assert "Example" in sections(value.__doc__)
    if not inspect.isclass(value):
        check_function(value, value.__doc__)
        return
    check_first_line(value.__doc__, verb=True)
    found = sections(value.__doc__)
    assert items(found.get("Attributes", [])) == fields(value)
    if not fields(value) and "__init__" in vars(value):
        assert items(found["Args"]) == list(inspect.signature(value).parameters)
    checked = vars(value).get("__post_init__")
    assert checked is None or "raise FpqError" not in inspect.getsource(checked) or items(found["Raises"])


@pytest.mark.parametrize("name", CLASSES)
def test_docstrings_of_methods_and_properties(name):
    for method in methods(PUBLIC[name]).values():
        check_function(method, method.__doc__)
    for attribute in vars(PUBLIC[name]).values():
        if isinstance(attribute, PROPERTIES):
            check_first_line(attribute.__doc__, verb=False)
            assert not has_type(attribute.__doc__.splitlines()[0])


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_have_a_comment_and_a_row_in_the_table_of_formats(name):
    name = name.rpartition(".")[2]
    comment = re.search(rf"^#: (.*\.)\n{name} = ", inspect.getsource(formats), re.MULTILINE)
    assert comment and not has_type(comment[1])
    assert f"\n``{name}``  " in inspect.cleandoc(fpq.Format.__doc__)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name, tmp_path, monkeypatch, request):
    if name in HOPPER:
        request.getfixturevalue("hopper_compiler")
    monkeypatch.chdir(tmp_path)  # what they save is there
    globs = {"jax": jax, "jnp": jnp, "np": np, "fpq": fpq}
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    for example in doctest.DocTestFinder().find(PUBLIC[name], name, module=False, globs=globs):
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).attempted > 0
    assert not report, "".join(report)
