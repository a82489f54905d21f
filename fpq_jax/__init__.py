"""fpq_jax: post-training W4A8 floating-point quantization of large language models (ZeroQuant-FP) in JAX."""

from pathlib import Path as _Path

# In a checkout, models/ and configs/ stand beside this folder; a wheel has them inside it (see pyproject.toml).
if not _Path(__file__).with_name("models").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))

from fpq_jax._activations import quantize_tokens
from fpq_jax._checkpoint import load, save
from fpq_jax._errors import FpqError
from fpq_jax._formats import (
    E2M1,
    E2M1_QTORCH,
    E3M0,
    E3M0_QTORCH,
    E4M3,
    E4M3_QTORCH,
    E5M2,
    E5M2_QTORCH,
    INT4,
    INT4_ASYM,
    INT8,
    INT8_ASYM,
    Format,
    cast,
    decode,
    encode,
    pack,
    unpack,
)
from fpq_jax._generation import Generated, Generator, Sampling
from fpq_jax._gptq import gptq, gptq_with_stats, hessian
from fpq_jax._hessians import Hessians, collect_hessians
from fpq_jax._hopper import compile_for_hopper, hopper
from fpq_jax._linear import linear
from fpq_jax._lorc import lorc
from fpq_jax._mesh import make_mesh
from fpq_jax._perplexity import Perplexity, perplexity
from fpq_jax._program import Kernel, Program
from fpq_jax._qtensor import Axes, LowRank, QTensor, dequantize, expand, quantize_array
from fpq_jax._quantized import quantized
from fpq_jax._recipe import Recipe
from fpq_jax._select import Use
from fpq_jax._spec import QuantSpec
from fpq_jax._text import text_windows
from fpq_jax._training import combine, partition, straight_through
from fpq_jax._transform import (
    TreeReport,
    dequantize_params,
    expand_params,
    quantize_blocks,
    quantize_params,
    quantize_params_with_report,
)
from fpq_jax._uses import find_kernels
from fpq_jax.models import prepare

__all__ = [
    "E2M1",
    "E2M1_QTORCH",
    "E3M0",
    "E3M0_QTORCH",
    "E4M3",
    "E4M3_QTORCH",
    "E5M2",
    "E5M2_QTORCH",
    "INT4",
    "INT4_ASYM",
    "INT8",
    "INT8_ASYM",
    "Axes",
    "Format",
    "FpqError",
    "Generated",
    "Generator",
    "Hessians",
    "Kernel",
    "LowRank",
    "Perplexity",
    "Program",
    "QTensor",
    "QuantSpec",
    "Recipe",
    "Sampling",
    "TreeReport",
    "Use",
    "cast",
    "collect_hessians",
    "combine",
    "compile_for_hopper",
    "decode",
    "dequantize",
    "dequantize_params",
    "encode",
    "expand",
    "expand_params",
    "find_kernels",
    "gptq",
    "gptq_with_stats",
    "hessian",
    "hopper",
    "linear",
    "load",
    "lorc",
    "make_mesh",
    "pack",
    "partition",
    "perplexity",
    "prepare",
    "quantize_array",
    "quantize_blocks",
    "quantize_params",
    "quantize_params_with_report",
    "quantize_tokens",
    "quantized",
    "save",
    "straight_through",
    "text_windows",
    "unpack",
]
