"""Time GPTQ against a torch implementation of the published algorithm, in one process, on the same matrix.

    python scripts/bench_gptq.py --size 4096 --group-size 256

Prints one line of JSON: seconds of each (best of --repeats, taken in turns), their ratio, seconds of the first call
(compilation included) and both output errors. torch is the project's extra ``torch``.
"""

import json
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fpq_jax import E2M1, QuantSpec, dequantize, gptq_with_stats, output_error


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time GPTQ against torch."""

    size: int = 4096
    """Inputs and outputs of the square weight."""
    group_size: int = 256
    repeats: int = 3
    seed: int = 0


def torch_gptq(w, hessian, group_size: int, damping: float = 0.01, block_size: int = 128):
    """The published algorithm: w [out, in], block-wise with lazy updates, E2M1, one scale per row and group."""
    import torch

    values = torch.tensor(E2M1.grid, device=w.device)
    midpoints = (values[1:] + values[:-1]) / 2
    w, h = w.clone(), hessian.clone()
    n = w.shape[1]
    h.diagonal().add_(damping * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for start in range(0, n, block_size):
        end = min(start + block_size, n)
        block, u_block = w[:, start:end].clone(), u[start:end, start:end]
        errors = torch.zeros_like(block)
        for i in range(end - start):
            if (start + i) % group_size == 0:
                scale = w[:, start + i : start + i + group_size].abs().amax(dim=1) / E2M1.max
            column = block[:, i]
            rounded = values[torch.bucketize(column / scale, midpoints)] * scale
            q[:, start + i] = rounded
            error = (column - rounded) / u_block[i, i]
            block[:, i:] -= error[:, None] * u_block[i, i:][None]
            errors[:, i] = error
        w[:, end:] -= errors @ u[start:end, end:]
    return q


def main(options: Options) -> None:
    import torch

    n = options.size
    rng = np.random.default_rng(options.seed)
    w = rng.standard_normal((n, n), dtype=np.float32)
    x = rng.standard_normal((2 * n, n), dtype=np.float32)
    x[:, 1:] += 0.5 * x[:, :-1]
    hessian = x.T @ x
    spec = QuantSpec(group_size=options.group_size)
    w_jax, h_jax = jnp.asarray(w), jnp.asarray(hessian)
    w_torch, h_torch = torch.tensor(w.T.copy()), torch.tensor(hessian)

    def timed(f):
        began = time.perf_counter()
        result = jax.block_until_ready(f())
        return time.perf_counter() - began, result

    ours, theirs = [], []
    first_call_seconds, _ = timed(lambda: gptq_with_stats(w_jax, h_jax, spec))
    for _ in range(options.repeats):
        seconds, q = timed(lambda: gptq_with_stats(w_jax, h_jax, spec)[0])
        ours.append(seconds)
        seconds, q_torch = timed(lambda: torch_gptq(w_torch, h_torch, options.group_size))
        theirs.append(seconds)
    error = float(output_error(w_jax, dequantize(q), h_jax))
    error_torch = float(output_error(w_jax, jnp.asarray(q_torch.numpy().T), h_jax))
    result = {
        "size": n,
        "group_size": options.group_size,
        "first_call_seconds": round(first_call_seconds, 4),
        "fpq_jax_seconds": round(min(ours), 4),
        "torch_seconds": round(min(theirs), 4),
        "torch_over_fpq_jax": round(min(theirs) / min(ours), 2),
        "error": error,
        "torch_error": error_torch,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
