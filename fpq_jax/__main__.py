"""What there is to run: python -m fpq_jax, or fpq-jax once it is installed."""

import importlib
import sys

from fpq_jax._support.console import run_command
from fpq_jax._version import __version__

COMMANDS = {
    "quantize": "quantize a LLaMA or OPT checkpoint and measure what it costs",
    "evaluate": "measure a model's perplexity",
    "generate": "continue texts",
    "export": "write a quantized model for other engines",
}


def main() -> None:
    """Run the command that the first argument names; without one, say which there are."""
    name, *rest = sys.argv[1:] or [""]
    if name in COMMANDS:
        command = importlib.import_module(f"fpq_jax.{name}")
        sys.argv = [f"{sys.argv[0]} {name}", *rest]
        run_command(command.main, command.Options, name)
        return
    if name == "--version":
        print(f"fpq_jax {__version__}")
        return
    lines = [f"  python -m fpq_jax.{command:<9} {what}" for command, what in COMMANDS.items()]
    print("\n".join([f"fpq_jax {__version__}: FP4 and FP8 quantization of language models in JAX.", "", *lines, ""]))
    print("Each says more with --help. Without arguments, quantize takes the demo model.")
    if name not in ("", "-h", "--help"):
        print(f"error: there is no command {name}; name one of {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
