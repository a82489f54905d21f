"""Everything that can be checked and timed on an H100 only, in one command of less than eight minutes.

    python scripts/h100_suite.py --output benchmarks/h100/h100.json     # on a machine with the GPU
    python scripts/h100_suite.py --tiny --output tiny.json              # the same parts, small, on any machine
    python scripts/h100_suite.py --predict                              # what the arithmetic says, nothing is run

Writes one JSON after each part, so that what was measured is kept whatever happens, and prints a table for each part.
Exit status 1 if a check of correctness failed or a part could not be run. torch, where there is one with a GPU, is
timed beside.
"""

import argparse
import dataclasses
import gc
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants some of the memory

from h100 import correctness, generation, gptq, kernel, linears
from h100.common import DATASHEET, FULL, TINY, Clock, Sizes, measured_ceilings
from rich.console import Console

from fpq_jax import FpqError
from fpq_jax._pipeline.report import environment  # private: told as in the commands' reports
from fpq_jax._support.files import write_json  # private: written whole, as the commands' reports

SECONDS = 460


class Part(NamedTuple):
    """run(sizes, clock, ceilings) gives rows, in about ``seconds``; table(rows) shows them."""

    run: Any
    table: Any
    seconds: float
    predictions: Any = None


# the kernel's first, in a process of its own, while the memory is free
PARTS = {
    "kernel": Part(kernel.run, kernel.table, 150, kernel.predictions),
    "correctness": Part(correctness.run, correctness.table, 60),
    "generation": Part(generation.run, generation.table, 85, generation.predictions),
    "gptq": Part(gptq.run, gptq.table, 35, gptq.predictions),
    "linears": Part(linears.run, linears.table, 60, linears.predictions),
    "pipeline": Part(gptq.run_pipeline, gptq.pipeline_table, 70),
}
console = Console(markup=False, highlight=False, soft_wrap=True)


def main(arguments: argparse.Namespace) -> int:
    sizes = TINY if arguments.tiny else FULL
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        raise FpqError(f"There is no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}.")
    if arguments.predict:
        for name, part in PARTS.items():
            if part.predictions is not None:
                _print(name, part.predictions(sizes))
        return 0
    output = arguments.output
    if output is None:
        raise FpqError("Name a file for the result: --output benchmarks/h100/h100.json.")
    if not output.absolute().parent.is_dir():
        raise FpqError(f"The result {output} cannot be written; name a file in a folder that exists.")
    clock = Clock(arguments.seconds)
    result: dict[str, Any] = {
        "version": 1,
        "sizes": dataclasses.asdict(sizes),
        "datasheet": DATASHEET,
        **environment(),
    }
    try:
        result["ceilings"] = measured_ceilings(sizes.repeats)
    except Exception as error:  # shares are of the datasheet's then, and the result says so
        result |= {"ceilings": DATASHEET, "note": f"ceilings not measured: {type(error).__name__}: {str(error)[:200]}"}
    console.print("measured ceilings:", {name: round(value, 1) for name, value in result["ceilings"].items()})
    failed = False
    for name in arguments.parts or PARTS:
        # a part alone has all the time
        clock.start_part(clock.seconds if len(arguments.parts) == 1 else PARTS[name].seconds)
        result[name], ok = _run_part(name, sizes, clock, result["ceilings"])
        failed |= not ok
        result["seconds"] = round(time.perf_counter() - clock.began, 1)
        result |= environment()
        write_json(output, result)
        _print(name, result[name])
    console.print(f"{result['seconds']} s; everything is in {output}")
    return int(failed)


def _run_part(name: str, sizes: Sizes, clock: Clock, ceilings: dict[str, float]) -> tuple[list[dict[str, Any]], bool]:
    began = time.perf_counter()
    try:
        rows = PARTS[name].run(sizes, clock, ceilings)
    except Exception as error:  # the other parts are worth their time all the same
        console.print_exception()
        return [{"note": f"{type(error).__name__}: {str(error)[:500]}"}], False
    console.print(f"{name}: {time.perf_counter() - began:.1f} s")
    return rows, all(row.get("passed", True) for row in rows)


def _print(name: str, rows: list[dict[str, Any]]) -> None:
    if list(rows[0]) == ["note"]:
        console.print(f"{name}: {rows[0]['note']}")
    else:
        console.print(f"\n## {name}\n\n{PARTS[name].table(rows)}\n")


def _arguments() -> argparse.Namespace:
    # argparse, since tyro is not on every machine with a GPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any machine")
    parser.add_argument("--predict", action="store_true", help="print predictions and run nothing")
    parser.add_argument("--parts", nargs="*", default=[], help=f"some of {', '.join(PARTS)}; all by default")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what is not measured by then is left out")
    return parser.parse_args()


if __name__ == "__main__":
    gc.freeze()  # what is imported is looked through at every free_memory otherwise
    try:
        raise SystemExit(main(_arguments()))
    except FpqError as error:
        print(f"error: {error}")
        raise SystemExit(2) from None
