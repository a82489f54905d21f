"""A model made ready to be run: Linears of one input merged, weights in the layout that they keep."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from fpq_jax._errors import FpqError
from fpq_jax._matmul.fp4_kernel.fragments import Fragments
from fpq_jax._matmul.linear import RowParallelKernel
from fpq_jax._matmul.products import FP8_MULTIPLE, product_kind
from fpq_jax._matmul.weight_layouts import check_any_for_fragments, check_layout, is_quantized, to_layout
from fpq_jax._numerics.concatenate import can_concatenate, concatenate, joined
from fpq_jax._numerics.qtensor import QTensor, check_exponents
from fpq_jax._support.mesh import MODEL, abstract_mesh
from fpq_jax.models.layers import Block, Embedding, Linear, MergedLinear
from fpq_jax.models.parameters import params_of, with_params
from fpq_jax.models.sharding import sharding, shardings, split_of


def prepare(
    model: Any, weights: str = "fp8", *, attention: str = "xla", mesh: Mesh | AbstractMesh | None = None
) -> Any:
    """Prepares a model to generate and evaluate with: a copy that gives the same results and cannot be saved.

    Query, key and value become one product, and gate and up another, where that is exact; quantized weights get the
    layout in which they are multiplied. It also works on abstract models. Arrays that need no change are shared with
    the model.

    Args:
        model: one of this library's models, quantized or not.
        weights: the layout of quantized weights. ``"fp8"`` expands 4-bit codes to FP8 once; ``"packed"`` leaves them
            packed until they are multiplied; ``"fragments"`` lays them out for this library's own GPU kernel, which has
            not been measured on a GPU yet.
        attention: the implementation that prompts use, ``"xla"`` or ``"cudnn"``, which needs a GPU and 16-bit
            arithmetic.
        mesh: devices over whose "model" axis the weights are divided; by default they stay where they are. An
            ``AbstractMesh`` gives an abstract model.

    Returns:
        The prepared model.

    Raises:
        FpqError: an option has an impossible value, or the model cannot be divided over the mesh.

    Example:
        >>> model = fpq.load("demo-llama")
        >>> ready = fpq.prepare(model)
        >>> ready.prepared, model.prepared
        (True, False)
    """
    mesh = abstract_mesh(mesh) if isinstance(mesh, AbstractMesh) else mesh
    on = model.mesh if mesh is None else mesh
    check_layout(weights, None if on is None else on.size)
    check_any_for_fragments(params_of(model).values(), weights)
    if attention not in ("xla", "cudnn"):
        raise FpqError(f"attention is {attention!r}; it must be xla or cudnn.")
    return prepare_in_place(nnx.clone(model) if mesh is None else shard(model, mesh), weights, attention)


def shard(model: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The model with its parameters on ``mesh``. FpqError if it cannot be divided so."""
    if model.prepared and model.mesh != mesh:
        raise FpqError("A model that was prepared for other devices cannot be divided; load it without weights.")
    params = params_of(model)
    if not model.prepared:
        params = jax.tree.map(_onto, params, shardings(type(model), model.config, params, mesh))
    return on_mesh(with_params(model, params), mesh)


def on_mesh(model: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Marks the model's parameters as being on ``mesh``, as ``shardings`` has them."""
    model.mesh = mesh
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Embedding):
            where = sharding(type(model), f"{path[-1]}.embedding", module.embedding.get_value(), mesh)
            module.mesh = None if jax.tree.leaves(where)[0].is_fully_replicated else mesh
    return model


def prepare_in_place(model: Any, weights: str, attention: str = "xla") -> Any:
    """``prepare`` of a model that nobody else holds: what is replaced is freed as it goes."""
    model.decode_rows = 1
    # blocks alone: a list of all modules would hold what is replaced until the end
    blocks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Block)]
    for block in blocks:
        for name, parts in block.MERGED.items():
            _merge(block, name, parts, _Placement(model, name), weights)
        if hasattr(block, "implementation"):
            block.implementation = attention
    for path, module in nnx.iter_modules(model):
        parameter = _weight(module)
        if parameter is not None and is_quantized(kernel := parameter.get_value()):
            placement = _Placement(model, str(path[-1]))
            part = "embedding" if isinstance(module, Embedding) else "kernel"
            kernel = placement.laid_out(kernel, weights, pad=model.mesh is None, part=part)
            if isinstance(kernel, QTensor) and product_kind(kernel) == "fp8":
                model.decode_rows = FP8_MULTIPLE
                kernel = placement.row_parallel(kernel)
            parameter.set_value(kernel)
    own = [kernel for kernel in params_of(model).values() if isinstance(kernel, Fragments)]
    if own and all(kernel.low_rank is None for kernel in own):
        # XLA makes three kernels of one row's norm and absmax, and two of several rows'; LoRC's products cost more then
        model.decode_rows = max(model.decode_rows, 2)
    model.prepared = True
    return model


def _weight(module: Any) -> Any:
    """The parameter of a module that ``linear`` multiplies with."""
    if isinstance(module, Linear | MergedLinear):
        return module.kernel
    return module.embedding if isinstance(module, Embedding) else None


class _Placement:
    """Computes the parameters of the Linear called ``name``, each where it belongs."""

    def __init__(self, model: Any, name: str):
        self.model_class, self.mesh, self.name = type(model), model.mesh, name
        self.shards = 1 if model.mesh is None else model.mesh.shape[MODEL]

    def computed(self, f: Callable[..., Any], *arguments: Any, part: str = "kernel", **static: Any) -> Any:
        """f(*arguments, **static), or the shapes of it where the arguments are shapes."""
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arguments))
        if self.mesh is None and not abstract:
            return f(*arguments, **static)
        shapes = jax.eval_shape(lambda *leaves: f(*leaves, **static), *arguments)
        if self.mesh is None:
            return shapes
        where = sharding(self.model_class, f"{self.name}.{part}", shapes, self.mesh)
        if abstract:
            return jax.tree.map(_onto, shapes, where)
        return _computed_onto(arguments, f, tuple(static.items()), tuple(jax.tree.leaves(where)))

    def laid_out(self, kernel: Any, layout: str, *, pad: bool, part: str = "kernel") -> Any:
        """``to_layout``."""
        if self.mesh is not None and isinstance(kernel, QTensor) and kernel.has_fp8_form:
            check_exponents(kernel)  # which jit hides from it
        return self.computed(to_layout, kernel, part=part, layout=layout, pad=pad)

    def row_parallel(self, kernel: QTensor) -> Any:
        """Marked for ``linear`` where a device has some of the inputs."""
        if self.mesh is None or split_of(self.model_class, self.name) != "inputs":
            return kernel
        return RowParallelKernel(kernel, self.mesh)


def _merge(module: Block, name: str, parts: tuple[str, ...], placement: _Placement, weights: str) -> None:
    linears = [getattr(module, part) for part in parts]
    if getattr(module, name) is not None:
        return
    kernels, biases = zip(*(linear.weights for linear in linears), strict=True)
    if weights == "fp8" and all(isinstance(kernel, QTensor) for kernel in kernels):
        kernels = tuple(placement.laid_out(kernel, weights, pad=False) for kernel in kernels)  # of one format then
    if not can_concatenate(kernels):
        return
    sizes = tuple(kernel.shape[1] for kernel in kernels)
    bias = None
    if None not in biases:
        bias = placement.computed(joined, biases, part="bias", axis=0, shards=placement.shards)
    kernel = placement.computed(concatenate, kernels, shards=placement.shards)
    setattr(module, name, nnx.data(MergedLinear(kernel, bias, sizes, placement.shards)))
    for part in parts:
        setattr(module, part, None)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _computed_onto(arguments: Any, f: Callable[..., Any], static: Any, where: tuple[Any, ...]) -> Any:
    """f(*arguments, **static), its leaves ``where`` they belong; compiled once for all layers."""
    leaves, structure = jax.tree.flatten(f(*arguments, **dict(static)))
    return jax.tree.unflatten(structure, map(jax.lax.with_sharding_constraint, leaves, where))


def _onto(leaf: Any, where: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct) or isinstance(where.mesh, AbstractMesh):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.device_put(leaf, where)
