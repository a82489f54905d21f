"""What a person sees while a command runs: progress on a terminal, plain lines elsewhere; errors in one sentence."""

import dataclasses
import errno
import inspect
import logging
import os
import signal
import sys
import threading
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fpq_jax._errors import FpqError
from fpq_jax._support.mesh import is_first, several_processes, start_processes
from fpq_jax._version import __version__

Options = TypeVar("Options")
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # of Unicode's bidirectional classes

# names and texts are written as they are, and a long row is never broken into two lines
console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with the time left; yields a function that advances it. Without a terminal nothing is drawn."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps=1: bar.update(task, advance=steps)


def write_text(text: str) -> None:
    """Text that is data, character by character; on a terminal, which would obey them, control characters are shown as
    their codes."""
    if not console.quiet:
        console.file.write(_visible(text) if console.is_terminal else text)
        console.file.flush()


def _visible(text: str) -> str:
    """Control characters but tabs and new lines, and those that turn the direction of writing."""
    obeyed = lambda c: (unicodedata.category(c) == "Cc" and c not in "\t\n") or unicodedata.bidirectional(c) in _TURNS
    return "".join(c.encode("unicode_escape").decode() if obeyed(c) else c for c in text)


def join_processes() -> None:
    """``start_processes``; of all processes only the first one is heard from then on."""
    start_processes()
    console.quiet = not is_first()


def run_command(main: Callable[[Options], None], options: type[Options], name: str | None = None) -> None:
    """Parse the command line into ``options`` and run ``main``; FpqError and system errors end with status 2.

    ``name`` is a command's module; None for a script.
    """
    import tyro

    for library in ("absl", "asyncio"):  # orbax's: what fails is told below, once
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if "--version" in sys.argv[1:]:
        print(f"fpq_jax {__version__}")
        return
    description = f"{inspect.cleandoc(options.__doc__ or '')} With --version, print the version of fpq_jax."
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        arguments = _once(sys.argv[1:], options)
        prog = name and f"python -m fpq_jax.{name}"
        parsed = tyro.cli(options, prog=prog, description=description, args=arguments)
        _main(main, parsed)
    except FpqError as error:
        _fail(str(error))
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "Interrupted.", file=sys.stderr)
        terminated = isinstance(interrupt, _Terminated) or isinstance(interrupt.__context__, _Terminated)
        _end(128 + (signal.SIGTERM if terminated else signal.SIGINT))
    except OSError as error:
        if error.errno is None:
            raise
        full = "; make room there and start the same command again" if error.errno == errno.ENOSPC else ""
        _fail(f"{error.strerror}{f': {error.filename}' if error.filename else ''}{full}.")
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: temporary folders are removed."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def _once(arguments: list[str], options: type) -> list[str]:
    """A command line that has each flag once: what is said of one several times is put together where it may have
    several values; otherwise the last counts."""
    several = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(options) if str(f.type).startswith("tuple")}
    found: dict[str, list[str]] = {"": []}
    at = ""
    for argument in arguments:
        if not argument.startswith("--"):
            found[at].append(argument)
            continue
        given, equals, value = argument.partition("=")
        at = given.replace("_", "-")
        if at in several:
            found.setdefault(at, [at]).extend([value] if equals else [])
        else:
            found[at] = [argument]
    return [word for words in found.values() for word in words]


def _main(main: Callable[[Options], None], parsed: Options) -> None:
    try:
        main(parsed)
    except (FpqError, OSError):
        raise
    except Exception:
        if not several_processes():
            raise
        traceback.print_exc()
        _end(1)


def _fail(message: str) -> Any:
    print(f"error: {message}", file=sys.stderr)
    _end(2)


def _end(status: int) -> Any:
    if several_processes():
        # an ordinary end would wait for the other processes, which wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status) from None


def shortened(spec: str) -> str:
    """The name of a text in 40 columns; of a long path the end."""
    return f"{spec if len(spec) <= 40 else '...' + spec[-37:]:<40}"


def size_text(size: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
