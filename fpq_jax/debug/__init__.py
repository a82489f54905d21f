"""What a program becomes on an H100, found out by compiling for one."""

from fpq_jax.debug.compiled_program import Launch, Program
from fpq_jax.debug.hopper import compile_for_hopper, hopper

__all__ = ["Launch", "Program", "compile_for_hopper", "hopper"]
