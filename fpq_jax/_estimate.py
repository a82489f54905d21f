"""What a job will take, found out before it starts: memory of the host and of each device, and disk.

The memory of the programs is XLA's own analysis of them; they are compiled here, and run later.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpq_jax._calibration import Activations, Together, activations_of, lower_accumulate, sharing
from fpq_jax._errors import FpqError
from fpq_jax._layerwise import Skeleton, lower_losses
from fpq_jax._lorc import lorc
from fpq_jax._machine import free_device_memory, free_disk, free_host_memory, resident_memory
from fpq_jax._qtensor import QTensor, quantize_array
from fpq_jax._recipe import LinearRecipe
from fpq_jax._report import size_text
from fpq_jax._solve import lower_solve, solved_together
from fpq_jax._tree import Flat
from fpq_jax.models import params_of
