"""python -m fpq_jax: what there is, and one of it."""

import importlib

import pytest

import fpq_jax
from fpq_jax.__main__ import COMMANDS, main


def said(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["fpq-jax", *arguments])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_commands_are_listed(monkeypatch, capsys, arguments):
    out = said(monkeypatch, capsys, *arguments)
    assert fpq_jax.__version__ in out and all(f"python -m fpq_jax.{name}" in out for name in COMMANDS)
    for name in COMMANDS:
        assert importlib.import_module(f"fpq_jax.{name}").Options


def test_the_version(monkeypatch, capsys):
    assert said(monkeypatch, capsys, "--version") == f"fpq_jax {fpq_jax.__version__}\n"
    assert said(monkeypatch, capsys, "export", "--version") == f"fpq_jax {fpq_jax.__version__}\n"


def test_a_command_is_run_with_the_rest_of_the_arguments(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        said(monkeypatch, capsys, "evaluate", "--model", "no/such/model/here")
    assert exit_.value.code == 2 and "There is no model folder no/such/model/here" in capsys.readouterr().err


def test_an_unknown_command_is_one_sentence(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        said(monkeypatch, capsys, "quantise")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        "error: there is no command quantise; name one of quantize, evaluate, generate, export.\n"
    )
