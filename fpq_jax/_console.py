"""What a person sees while a command runs: progress on a terminal, plain lines elsewhere; errors in one sentence."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fpq_jax._errors import FpqError
from fpq_jax._mesh import is_first, start_processes

Options = TypeVar("Options")

# soft_wrap: a long row is never broken into two lines
console = Console(highlight=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
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
    parsed = tyro.cli(options, prog=name and f"python -m fpq_jax.{name}")
    try:
        main(parsed)
    except FpqError as error:
        _fail(str(error))
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "Interrupted; nothing unfinished was written.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno is None:
            raise
        _fail(f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}.")


def _fail(message: str) -> Any:
    print(f"error: {message}", file=sys.stderr)
    if jax.process_count() > 1:
        # an ordinary end would wait for the other processes, which wait for this one
        sys.stderr.flush()
        os._exit(2)
    raise SystemExit(2) from None
