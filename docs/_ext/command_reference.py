"""The directive ``command``: the options of ``python -m fpq_jax.NAME``, read from the command's own ``Options``."""

import ast
import dataclasses
import importlib
import inspect
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class Command(SphinxDirective):
    """``.. command:: quantize`` lists what the command is, how it is called, and each option."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        options = importlib.import_module(f"fpq_jax.{name}").Options
        self.env.note_dependency(inspect.getfile(options))
        return self.parse_text_to_nodes("\n".join(reference(name, options)))


def reference(name: str, options: type[Any]) -> list[str]:
    """The reference of a command, in the Markdown of the page that asks for it."""
    hints, told = get_type_hints(options), field_docs(options)
    fields = dataclasses.fields(options)
    required = [f for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    usage = " ".join([f"python -m fpq_jax.{name}", *(_flag(f.name, hints[f.name]) for f in required), "[OPTIONS]"])
    lines = [inspect.cleandoc(options.__doc__ or ""), "", "```text", usage, "```", ""]
    for field in fields:
        default = "required" if field in required else _default(field)
        lines += [
            f":::{{option}} {_flag(field.name, hints[field.name])}",
            "",
            told.get(field.name, ""),
            *(["", f"*{default}*"] if default else []),
            ":::",
            "",
        ]
    return [f":::{{program}} fpq_jax.{name}", ":::", "", *lines]


def field_docs(options: type[Any]) -> dict[str, str]:
    """The string below each field of a dataclass."""
    (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(options))).body
    assert isinstance(definition, ast.ClassDef)
    told = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            told[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return told


def _flag(name: str, hint: Any) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if hint is bool else f"{flag} {_value(hint)}"


def _value(hint: Any) -> str:
    """What a person writes behind the flag."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (Union, types.UnionType):
        return "|".join(_value(arg) for arg in args if arg is not types.NoneType)
    if origin in (tuple, list):
        return f"{_value(args[0])} ..."
    return {"str": "TEXT", "int": "N", "float": "X", "Path": "PATH"}.get(hint.__name__, hint.__name__.upper())


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default is not dataclasses.MISSING else None
    return "" if value in (None, (), False) else f"default: {value}"


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
