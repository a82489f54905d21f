import errno
from dataclasses import dataclass

import pytest

import fpq_jax
from fpq_jax import FpqError
from fpq_jax._support.console import console, progress_bar, run_command, write_text


@dataclass(frozen=True, kw_only=True)
class Options:
    """Do something."""

    number: int = 3
    """A number."""
    words: tuple[str, ...] = ()
    """Words."""
    yes: bool = False
    """Yes."""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FpqError("The thing is wrong; do the other thing."), 2, "error: The thing is wrong; do the other thing.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            2,
            "error: No space left on device: out/x; make room there and start the same command again.\n",
        ),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
)
def test_errors_are_one_sentence_and_a_status(monkeypatch, capsys, error, status, said):
    def main(options):
        raise error

    monkeypatch.setattr("sys.argv", ["prog"])
    with pytest.raises(SystemExit) as exit_:
        run_command(main, Options, "quantize")
    assert exit_.value.code == status and capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(options):
        raise ZeroDivisionError

    monkeypatch.setattr("sys.argv", ["prog", "--number", "4"])
    with pytest.raises(ZeroDivisionError):
        run_command(main, Options, "quantize")


def test_a_wrong_flag_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prog", "--numbr", "4"])
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda options: None, Options, "quantize")
    assert exit_.value.code == 2
    assert "--numbr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words", "number"),
    [
        ("--words a b --number 5 --words c", ("a", "b", "c"), 5),
        ("--words=a --number=-5 --words=b=c d --yes", ("a", "b=c", "d"), -5),
        ("--yes", (), 3),
        ("--number 4 --number=6", (), 6),
    ],
)
def test_a_flag_of_several_values_may_be_given_several_times(monkeypatch, line, words, number):
    got = []
    monkeypatch.setattr("sys.argv", ["prog", *line.split()])
    run_command(got.append, Options, "quantize")
    assert got == [Options(number=number, words=words, yes="--yes" in line)]


TEXT = "a\tb :smile: [bold]c[/bold] \x1b[31mred\x07 \u202eback\n\x85🙂\r\n"


def test_text_that_is_data_is_written_as_it_is(capsys):
    write_text(TEXT)
    assert capsys.readouterr().out == TEXT
    console.print(TEXT.replace("\t", " "))
    assert ":smile: [bold]c[/bold]" in capsys.readouterr().out


def test_a_terminal_is_shown_what_it_would_obey(capsys, monkeypatch):
    monkeypatch.setattr(type(console), "is_terminal", True)
    write_text(TEXT)
    shown = "a\tb :smile: [bold]c[/bold] \\x1b[31mred\\x07 \\u202eback\n\\x85🙂\\r\n"
    assert capsys.readouterr().out == shown


def test_progress_draws_nothing_without_a_terminal(capsys):
    with progress_bar("work", 3) as advance:
        advance()
        advance(2)
    assert capsys.readouterr().out == ""


def test_every_command_tells_its_version(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prog", "--version"])
    run_command(lambda options: pytest.fail("it ran"), Options, "quantize")
    assert capsys.readouterr().out == f"fpq_jax {fpq_jax.__version__}\n"
