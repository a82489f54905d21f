"""fpq_jax: post-training W4A8 floating-point quantization of large language models (ZeroQuant-FP) in JAX."""

from pathlib import Path as _Path

# In a checkout, models/ and configs/ stand beside this folder; a wheel has them inside it (see pyproject.toml).
if not _Path(__file__).with_name("models").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))

from fpq_jax._algorithms.gptq import gptq, gptq_with_stats
from fpq_jax._algorithms.lorc import lorc
from fpq_jax._algorithms.output_error import output_error
from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._algorithms.statistics import hessian
from fpq_jax._checkpoints.load_save import load, save
from fpq_jax._errors import FpqError
from fpq_jax._generation.generator import Generated, Generator, Sampling
from fpq_jax._matmul.linear import linear
from fpq_jax._numerics.activations import quantize_tokens
from fpq_jax._numerics.formats import (
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
    NF4,
    Format,
    cast,
    decode,
    encode,
    pack,
    unpack,
)
from fpq_jax._numerics.qtensor import Axes, LowRank, QTensor, dequantize, expand, quantize_array
from fpq_jax._numerics.spec import QuantSpec
from fpq_jax._pipeline.perplexity import Perplexity, perplexity
from fpq_jax._pipeline.text import text_windows
from fpq_jax._support.mesh import make_mesh
from fpq_jax._transform.blocks import quantize_blocks
from fpq_jax._transform.conversion import dequantize_params, expand_params
from fpq_jax._transform.find_kernels import find_kernels
from fpq_jax._transform.hessians import Hessians, collect_hessians
from fpq_jax._transform.params import TreeReport, quantize_params, quantize_params_with_report
from fpq_jax._transform.quantized import quantized
from fpq_jax._transform.selection import ParamUse
from fpq_jax._transform.training import combine, partition, straight_through
from fpq_jax._version import __version__ as __version__
from fpq_jax.models.prepare import prepare

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
    "NF4",
    "Axes",
    "Format",
    "FpqError",
    "Generated",
    "Generator",
    "Hessians",
    "LowRank",
    "ParamUse",
    "Perplexity",
    "QTensor",
    "QuantSpec",
    "Recipe",
    "Sampling",
    "TreeReport",
    "cast",
    "collect_hessians",
    "combine",
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
    "linear",
    "load",
    "lorc",
    "make_mesh",
    "output_error",
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
