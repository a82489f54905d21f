"""LoRC's factors as a PEFT LoRA adapter, which engines load beside a quantized base.

y = base(x) + lora_B(lora_A(x)) * lora_alpha / r, with lora_A [r, in] and lora_B [out, r]: the factors transposed, and
lora_alpha = r. Linears of lower rank are filled up with zeros, since not every engine knows a rank for each.
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpq_jax._errors import FpqError
from fpq_jax._numerics.qtensor import LowRank, QTensor
from fpq_jax._storage.safetensors_writer import TensorsWriter

FOLDER = "lorc"  # in the folder of the weights


class AdapterWriter:
    """Writes the adapter of ``weights`` (by name; their shapes are enough) to a folder, Linear by Linear."""

    def __init__(self, folder: Path, weights: Mapping[str, QTensor]):
        self._folder = folder
        self._factors: dict[str, LowRank] = {n: q.low_rank for n, q in weights.items() if q.low_rank is not None}
        self.rank = max((factors.a.shape[1] for factors in self._factors.values()), default=0)
        self._writer: TensorsWriter | None = None
        if self.rank:
            shapes = {name: jax.eval_shape(self._padded, factors) for name, factors in self._factors.items()}
            named = {key: t for name, pair in shapes.items() for key, t in _named(name, pair).items()}
            self._writer = TensorsWriter(folder, named, stem="adapter_model")

    @property
    def nbytes(self) -> int:
        """Of all factors."""
        return self._writer.nbytes if self._writer else 0

    def write(self, name: str, q: QTensor) -> None:
        """Write a Linear's factors, if it has any."""
        if self._writer is None or q.low_rank is None:
            return
        self._folder.mkdir(exist_ok=True)
        for key, factor in _named(name, self._padded(q.low_rank)).items():
            self._writer.write(key, np.asarray(factor))

    def close(self) -> None:
        """Write what makes the folder an adapter."""
        if self._writer is None:
            return
        self._writer.close()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self._factors),
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
            "use_dora": False,
            "use_rslora": False,
        }
        (self._folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _padded(self, factors: LowRank) -> tuple[Any, Any]:
        """lora_A and lora_B. Scaled INT8 factors become float32, as products take them."""
        more = self.rank - factors.a.shape[1]
        a, b = factors.a, factors.b
        if factors.scale is not None:
            a, b = a.astype(jnp.float32) * factors.scale, b.astype(jnp.float32)
        return jnp.pad(a, ((0, 0), (0, more))).T, jnp.pad(b, ((0, more), (0, 0))).T


def tensor_names(linear: str) -> dict[str, str]:
    """Of a Linear's lora_A and lora_B in the file."""
    return {side: f"base_model.model.{linear}.{side}.weight" for side in ("lora_A", "lora_B")}


def low_rank_of(tensors: Mapping[str, Any]) -> LowRank:
    """The factors that such tensors are."""
    return LowRank(tensors["lora_A"].T, tensors["lora_B"].T)


def read_rank(folder: Path) -> int:
    """The rank of the adapter in a folder; FpqError if it is none that was written here."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FpqError(f"{path} is no adapter's configuration ({type(error).__name__}); export again.") from error
    if rank != alpha or not isinstance(rank, int):
        raise FpqError(f"{path} is of another adapter than fpq_jax writes; its lora_alpha is not its rank.")
    return rank


def _named(name: str, pair: tuple[Any, Any]) -> dict[str, Any]:
    return dict(zip(tensor_names(name).values(), pair, strict=True))
