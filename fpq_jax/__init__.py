"""fpq_jax: post-training W4A8 floating-point quantization of large language models (ZeroQuant-FP) in JAX."""

from pathlib import Path as _Path

# In a checkout, models/ and configs/ stand beside this folder; a wheel has them inside it (see pyproject.toml).
if not _Path(__file__).with_name("models").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))
