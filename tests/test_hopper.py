"""The proof that products run on FP8 tensor cores: programs compiled for an H100 on this machine."""

import math
import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from conftest import abstract_quantized
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from fpq_jax import FpqError, QuantSpec, linear, lorc, quantize_array
from fpq_jax._matmul.weight_layouts import to_layout
from fpq_jax.debug import compile_for_hopper, hopper

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("hopper_compiler")]

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
OPT_6_7B = {
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 4096,
    "ffn_dim": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
MODELS = {"llama-7b": LLAMA_7B, "opt-6.7b": OPT_6_7B}
# outputs and inputs of each FP8 product of a layer, query, key and value as one, gate and up as one
PRODUCTS = {
    "llama-7b": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)],
    "opt-6.7b": [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)],
}
SPECS = {"w8a8": QuantSpec(format="e4m3", group_size="channel"), "w4a8": QuantSpec(constraint="m2"), "bf16": None}
ROUTES = ("cublas", "triton")
WORKSPACE = 4 * 2**20  # of cuBLASLt
SMALLEST_WEIGHT = 4096 * 4096


@cache
def program(name, what, layers=32, rank=0, weights="fp8", mesh=None, **options):
    config = MODELS[name] | {"num_hidden_layers": layers}
    mesh = mesh and AbstractMesh(mesh, ("data", "model"))
    return hopper(abstract_quantized(config, SPECS[what], rank=rank, weights=weights, mesh=mesh), **options)


def kernels_per_layer(*arguments, **options):
    one, two = (len(program(*arguments, layers=layers, **options).launches) for layers in (1, 2))
    return two - one


def weight_shaped(compiled, name, products=None):
    """Kernels that write something of a weight's shape, either way round."""
    shapes = {tuple(sorted(shape)) for shape in products or PRODUCTS[name]}
    dims = lambda text: [tuple(sorted(map(int, m.split(",")))) for m in re.findall(r"\[([\d,]+)\]", text)]
    return [k for k in compiled.launches if shapes & set(dims(k.output))]


def weights_of(products):
    """[(outputs, inputs)] of the larger factors, Triton's split contractions put together."""
    dims = lambda text: [int(n) for n in re.search(r"\[([\d,]+)\]", text)[1].split(",")]
    larger = [max(map(dims, product.operands), key=math.prod) for product in products]
    return sorted((rows, math.prod(inner)) for rows, *inner in larger)


def abstract_weight(shape, spec, rank=0, weights="fp8"):
    def make(w):
        q = quantize_array(w, spec)
        return to_layout(lorc(w, q, rank=rank) if rank else q, weights)

    return jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.bfloat16))


def compiled_linear(tokens, shape, q, route="cublas", **options):
    return compile_for_hopper(linear, jax.ShapeDtypeStruct((tokens, shape[0]), jnp.bfloat16), q, route=route, **options)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tokens", [1, 5, 16, 256, 2048])
@pytest.mark.parametrize(("what", "rank"), [("w8a8", 0), ("w4a8", 0), ("w4a8", 8)])
def test_a_linear_is_one_fp8_product_for_any_number_of_tokens(what, rank, tokens, route):
    shape = (4096, 11008)
    compiled = compiled_linear(tokens, shape, abstract_weight(shape, SPECS[what], rank), route)
    assert len(compiled.matmuls("fp8_matmul")) == 1 and not compiled.matmuls("matmul", but=("lorc",))
    # one token's low-rank products are no matrix products
    assert len(compiled.matmuls("matmul")) == (2 if rank and tokens > 1 else 0)
    # the product and its split sums in float32, LoRC's, the codes; a copied weight would be 45 MB more
    padded = max(16, tokens)
    assert compiled.temp_bytes < WORKSPACE + padded * (4 * 4 * shape[1] * (1 if tokens > 16 else 2) + 3 * shape[0])
    # absmax, codes, product, epilogue; padding, or the scales of many tokens; LoRC with its own padding and split sums
    assert len(compiled.launches) <= 4 + (tokens < 16 or tokens >= 1024) + 6 * bool(rank)


@pytest.mark.parametrize("route", ROUTES)
def test_dimensions_that_fp8_does_not_take_are_padded_once_at_load(route):
    shape = (172, 100)
    q = abstract_weight(shape, SPECS["w8a8"])
    assert q.codes.shape == (112, 176) and q.shape == shape
    compiled = compiled_linear(16, shape, q, route)
    assert len(compiled.matmuls("fp8_matmul")) == 1 and not compiled.matmuls("matmul")
    assert not [k for k in compiled.launches if "[112,176]" in k.output]
    unpadded = jax.eval_shape(lambda w: quantize_array(w, SPECS["w8a8"]), jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    padded_each_time = compiled_linear(16, shape, unpadded, route)
    assert len(padded_each_time.launches) > len(compiled.launches)


def test_triton_multiplies_e4m3_with_wgmma():
    shape = (4096, 11008)
    compiled = compiled_linear(256, shape, abstract_weight(shape, SPECS["w8a8"]), "triton", ptx=True)
    assert re.search(r"wgmma\.mma_async\.[\w.]*\.e4m3\.e4m3", compiled.ptx)
    sixteen_bits = compile_for_hopper(
        linear, *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((256, 4096), shape)), ptx=True
    )
    assert "e4m3.e4m3" not in sixteen_bits.ptx


def test_a_gpu_without_fp8_has_no_such_product():
    shape = (4096, 11008)
    compiled = compiled_linear(256, shape, abstract_weight(shape, SPECS["w8a8"]), capability=8)
    assert not compiled.matmuls("fp8_matmul") and len(compiled.matmuls("matmul")) == 1


# What the assertions above are worth: each way to write the product that hopper users meet first fails them.


def quantized_operands(x, w):
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) * (1 / 448)
    return (x / scale).astype(jnp.float8_e4m3fn), scale


def broken(formulation, tokens=256, route="cublas"):
    x = jax.ShapeDtypeStruct((tokens, 4096), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((11008, 4096), jnp.float8_e4m3fn)
    row = jax.ShapeDtypeStruct((11008, 1), jnp.float32)
    if formulation == "weights stored [K, N]":
        w = jax.ShapeDtypeStruct((4096, 11008), jnp.float8_e4m3fn)

    def f(x, w, row):
        codes, scale = quantized_operands(x, w)
        if formulation == "scales on the operands":
            left, right = codes.astype(jnp.bfloat16) * scale.astype(x.dtype), w.astype(x.dtype) * row.astype(x.dtype)
            return jnp.einsum("mk,nk->mn", left, right)
        equation = "mk,kn->mn" if formulation == "weights stored [K, N]" else "mk,nk->mn"
        y = jnp.einsum(equation, codes, w, preferred_element_type=jnp.float32)
        return (y * scale * row.T).astype(x.dtype)

    return compile_for_hopper(f, x, w, row, route=route)


def test_the_formulation_itself_passes():
    for route in ROUTES:
        compiled = broken("none", route=route)
        assert len(compiled.matmuls("fp8_matmul")) == 1 and not compiled.matmuls("matmul")
        assert not [k for k in compiled.launches if "[11008,4096]" in k.output or "[4096,11008]" in k.output]


def test_weights_stored_with_k_first_are_copied():
    compiled = broken("weights stored [K, N]")
    assert [k for k in compiled.launches if "f8e4m3fn[11008,4096]" in k.output]
    assert compiled.temp_bytes > 11008 * 4096


def test_scales_on_the_operands_are_a_16_bit_product():
    for route in ROUTES:
        compiled = broken("scales on the operands", route=route)
        assert not compiled.matmuls("fp8_matmul") and len(compiled.matmuls("matmul")) == 1


def test_one_token_that_is_not_padded_is_no_fp8_product():
    assert not broken("none", tokens=1).matmuls("fp8_matmul")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("what", ["w8a8", "w4a8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_layer_by_both_routes(name, what, route):
    for options in ({"batch": 1}, {"batch": 16}, {"tokens": 2048}):
        compiled = program(name, what, layers=1, route=route, **options)
        assert weights_of(compiled.matmuls("fp8_matmul")) == sorted(PRODUCTS[name])
        assert not compiled.matmuls("matmul", but=("attention", "head"))
        assert not weight_shaped(compiled, name)
        if "batch" in options:
            assert compiled.temp_bytes < SMALLEST_WEIGHT


def layers_of(name, route):
    """One model whole, a few layers of the others."""
    return 32 if (name, route) == ("llama-7b", "cublas") else 4


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_of_a_whole_model(name, route):
    layers = layers_of(name, route)
    compiled = program(name, "w4a8", layers=layers, rank=8, batch=16, route=route, ptx=route == "triton")
    products = compiled.matmuls("fp8_matmul")
    assert weights_of(products) == sorted(PRODUCTS[name] * layers)
    assert not compiled.matmuls("matmul", but=("lorc", "attention", "head"))
    assert len(compiled.matmuls("matmul", but=("attention", "lorc"))) == 1  # the head
    assert not weight_shaped(compiled, name)
    assert compiled.temp_bytes < SMALLEST_WEIGHT
    cache = 2 * layers * 16 * 2048 * 4096 * 2
    assert cache <= compiled.alias_bytes < cache + 1024
    if route == "triton":
        assert re.search(r"wgmma\.mma_async\.[\w.]*\.e4m3\.e4m3", compiled.ptx)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MODELS)
def test_the_prefill_of_a_whole_model(name, route):
    layers = layers_of(name, route)
    compiled = program(name, "w4a8", layers=layers, rank=8, tokens=2048, route=route)
    assert weights_of(compiled.matmuls("fp8_matmul")) == sorted(PRODUCTS[name] * layers)
    assert not compiled.matmuls("matmul", but=("lorc", "attention", "head"))
    assert not weight_shaped(compiled, name)
    widest = max(rows for rows, _ in PRODUCTS[name])
    scores, product, hidden = 32 * 2048 * 2048, 2048 * widest, 2048 * 4096
    # scores and weights of one layer, one product in float32 and 16 bits, some hidden states
    assert compiled.temp_bytes < WORKSPACE + (4 + 2) * scores + (4 + 2) * product + 8 * 2 * hidden
    assert [k.output for k in compiled.launches if k.kind == "copy"] in ([], ["s32[1]"])


# kernels of one decoder layer with our own kernel: a decode step of one row, of 16 rows
OWN_KERNELS = {("llama-7b", 0): (22, 22), ("llama-7b", 8): (32, 32), ("opt-6.7b", 0): (21, 22)}


@pytest.mark.parametrize(("name", "rank"), OWN_KERNELS)
def test_a_decode_step_with_our_own_kernel(name, rank):
    """It multiplies packed codes: no weight is expanded, and nothing else multiplies one."""
    for batch, expected in zip((1, 16), OWN_KERNELS[name, rank], strict=True):
        options = dict(rank=rank, weights="fragments", batch=batch)
        assert kernels_per_layer(name, "w4a8", **options) == expected
        compiled = program(name, "w4a8", layers=2, **options)
        products = compiled.matmuls("fp4_matmul")
        words = [f"u32[{-(-out // 64)},{4 * -(-inputs // 64)},128]" for out, inputs in PRODUCTS[name]]
        assert sorted(product.operands[1] for product in products) == sorted(words * 2)
        assert all(product.operands[0].startswith("f8e4m3fn") for product in products)
        assert not compiled.matmuls("fp8_matmul") and not weight_shaped(compiled, name)
        assert {k.scope.split("/")[1] for k in compiled.matmuls("matmul")} <= {"attention", "head", "lorc"}
        assert compiled.temp_bytes < SMALLEST_WEIGHT
    assert "8 of our own kernel" in str(compiled)
    with pytest.raises(FpqError, match="Our own kernel is for capability 9, not 8"):
        program(name, "w4a8", layers=1, rank=rank, weights="fragments", capability=8)


def test_a_prefill_with_our_own_kernels_weights_is_that_of_packed_ones():
    own, packed = (program("llama-7b", "w4a8", layers=1, weights=how, tokens=2048) for how in ("fragments", "packed"))
    assert not own.matmuls("fp4_matmul")
    assert Counter(k.kind for k in own.launches) == Counter(k.kind for k in packed.launches)
    assert own.temp_bytes == packed.temp_bytes


# kernels of one decoder layer on the cuBLAS route: a decode step of 16 rows, of one row, a prefill of 2,048 tokens
KERNELS = {
    ("llama-7b", "bf16", 0): (14, 15, 13),
    ("llama-7b", "w8a8", 0): (22, 22, 23),
    ("llama-7b", "w4a8", 0): (22, 22, 23),
    ("llama-7b", "w4a8", 8): (31, 31, 36),
    ("opt-6.7b", "bf16", 0): (12, 15, 11),
    ("opt-6.7b", "w8a8", 0): (21, 21, 21),
    ("opt-6.7b", "w4a8", 0): (21, 21, 21),
    ("opt-6.7b", "w4a8", 8): (31, 31, 33),
}


@pytest.mark.parametrize(("name", "what", "rank"), KERNELS)
def test_kernels_of_a_decoder_layer(name, what, rank):
    found = (
        kernels_per_layer(name, what, rank=rank, batch=16),
        kernels_per_layer(name, what, rank=rank),
        kernels_per_layer(name, what, rank=rank, tokens=2048),
    )
    assert all(got <= known for got, known in zip(found, KERNELS[name, what, rank], strict=True)), found
    layer = program(name, what, rank=rank, layers=1)
    assert len(layer.matmuls("fp8_matmul")) == (0 if what == "bf16" else 4)
    assert not weight_shaped(layer, name)


@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_are_expanded_one_product_at_a_time(name):
    fp8, packed = (program(name, "w4a8", layers=2, weights=weights) for weights in ("fp8", "packed"))
    weights = 2 * sum(rows * inputs for rows, inputs in PRODUCTS[name])
    # half a byte for each weight, a byte for each group of 256 and a float32 for each row
    assert 0.48 * weights < fp8.argument_bytes - packed.argument_bytes < 0.5 * weights
    assert len(packed.matmuls("fp8_matmul")) == 8 and not packed.matmuls("matmul", but=("head", "attention"))
    largest = max(rows * inputs for rows, inputs in PRODUCTS[name])
    assert largest <= packed.temp_bytes < 1.5 * largest
    assert len(weight_shaped(packed, name)) <= 8
    assert len(packed.launches) <= len(fp8.launches) + 2 * 8


@pytest.mark.parametrize("name", MODELS)
def test_an_fp8_cache_is_read_as_codes(name):
    compiled = program(name, "w8a8", layers=1, batch=16, kv_cache="float8")
    codes, scales = 2 * 16 * 2048 * 4096, 2 * 16 * 2048 * 32 * 4
    assert codes + scales <= compiled.alias_bytes < codes + scales + 1024
    slots = [k for k in compiled.launches if re.search(r"(bf16|f32)\[16,32,2048,128\]", k.output)]
    assert not slots and len(compiled.matmuls("fp8_matmul")) == 4


# Two H100s: of each layer's products two are of outputs, and two of inputs, whose results are added up.


def collectives(compiled):
    return Counter((k.op, k.output) for k in compiled.launches if k.kind == "collective")


def halves(name):
    qkv, out, up, down = PRODUCTS[name]
    by_outputs, by_inputs = [(rows // 2, inputs) for rows, inputs in (qkv, up)], [(r, n // 2) for r, n in (out, down)]
    return by_outputs + by_inputs


# rows and tokens of the hidden states that are sent: those of a decode step are padded to 16
TWO = {"one row": ({"batch": 1}, 16, 1), "sixteen": ({"batch": 16}, 16, 1), "a prefill": ({"tokens": 2048}, 1, 2048)}


@pytest.mark.parametrize("case", TWO)
@pytest.mark.parametrize("name", MODELS)
def test_two_devices_send_what_tensor_parallelism_needs(name, case):
    options, rows, tokens = TWO[case]
    two = program(name, "w4a8", layers=2, rank=8, mesh=(1, 2), **options)
    assert weights_of(two.matmuls("fp8_matmul")) == sorted(halves(name) * 2)
    others = two.matmuls("matmul", but=("lorc", "head"))
    # attention's, of half the heads
    assert len(others) == (4 if tokens > 1 else 0) and all("[2048,16,128]" in k.operands[0] for k in others)
    if tokens == 1:  # a prefill's hidden states have such a shape
        assert not weight_shaped(two, name, PRODUCTS[name] + halves(name))
    batch = options.get("batch", 1)
    # a layer's two outputs, added up with LoRC's in them, and before them the tokens' absmax; the embedding
    expected = Counter({f"bf16[{rows},{tokens},4096]": 2 * 2, f"bf16[{rows},{tokens},1]": 2 * 2})
    expected[f"bf16[{batch},{tokens},4096]"] += 1
    found = collectives(two)
    assert {output: n for (op, output), n in found.items() if op == "all-reduce"} == expected
    # the likeliest token of each half of the vocabulary with its logit
    ((op, likeliest),) = [at for at in found if at[0] != "all-reduce"]
    assert op == "all-gather" and found[op, likeliest] == 1
    assert {int(n) for n in re.findall(r"\d+(?=[,\]])", likeliest)} <= {1, 2, batch}
    if tokens == 1:
        assert two.temp_bytes < SMALLEST_WEIGHT


def test_two_devices_have_half_of_everything_and_multiply_with_wgmma():
    compiled = program("llama-7b", "w4a8", layers=4, rank=8, batch=16, mesh=(1, 2), route="triton", ptx=True)
    assert weights_of(compiled.matmuls("fp8_matmul")) == sorted(halves("llama-7b") * 4)
    assert re.search(r"wgmma\.mma_async\.[\w.]*\.e4m3\.e4m3", compiled.ptx)
    assert sum(collectives(compiled).values()) == 4 * 4 + 2
    cache = 2 * 4 * 16 * 2048 * 4096 * 2
    assert cache // 2 <= compiled.alias_bytes < cache // 2 + 1024
    weights = 4 * sum(rows * inputs for rows, inputs in PRODUCTS["llama-7b"]) + 2 * 2 * 32000 * 4096
    assert compiled.argument_bytes - cache // 2 < 0.52 * weights


def test_rows_are_divided_over_data_and_packed_weights_and_an_fp8_cache_as_well():
    options = dict(layers=1, rank=8, batch=64, weights="packed", kv_cache="float8")
    compiled = program("llama-7b", "w4a8", mesh=(2, 2), **options)
    assert weights_of(compiled.matmuls("fp8_matmul")) == sorted(halves("llama-7b"))
    found = collectives(compiled)
    # 32 rows each; the tokens alone are gathered over "data"
    assert found[("all-reduce", "bf16[32,1,4096]")] == 3 and found[("all-reduce", "bf16[32,1,1]")] == 2
    assert sum(found.values()) == 7
    assert compiled.alias_bytes < 2 * 32 * 16 * 2048 * (128 + 4) + 1024


def test_what_is_on_several_meshes_is_said():
    on = lambda *sizes: jax.ShapeDtypeStruct(
        (4,), "float32", sharding=NamedSharding(AbstractMesh(sizes, ("data", "model")), PartitionSpec())
    )
    with pytest.raises(FpqError, match="on 2 meshes"):
        compile_for_hopper(lambda x, y: x + y, on(1, 2), on(2, 1))


def test_what_cannot_be_compiled_for_is_said():
    shape = (64, 64)
    q = abstract_weight(shape, SPECS["w8a8"])
    with pytest.raises(FpqError, match="route is 'nvcc'; it must be cublas or triton"):
        compiled_linear(16, shape, q, "nvcc")
    with pytest.raises(FpqError, match="capability is 7; it must be 9 or 8"):
        compiled_linear(16, shape, q, capability=7)
    with pytest.raises(FpqError, match="batch is 0"):
        hopper(None, batch=0)


def test_a_missing_compiler_is_said(monkeypatch):
    def fail(**options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    with pytest.raises(FpqError, match=r"pip install 'fpq-jax\[hopper\]'.*JAX_PLATFORMS=cpu"):
        compile_for_hopper(lambda x: x, jnp.ones(3))


def test_fast_accumulation_is_asked_for_unless_precision_is():
    shape = (4096, 4096)
    q = abstract_weight(shape, SPECS["w8a8"])
    precision = lambda program: re.search(r'"operand_precision":\[([^\]]*)\]', program.hlo)[1]
    assert precision(compiled_linear(16, shape, q)) == '"DEFAULT","DEFAULT"'
    with jax.default_matmul_precision("highest"):
        assert precision(compiled_linear(16, shape, q)) == '"HIGHEST","HIGHEST"'


def test_formats_without_an_fp8_product_show_as_what_they_are():
    shape = (4096, 4096)
    free = compiled_linear(16, shape, abstract_weight(shape, QuantSpec()))
    assert not free.matmuls("fp8_matmul") and len(free.matmuls("matmul")) == 1
    for weight, activation, products in (("e5m2", "e4m3", 1), ("e4m3", "e5m2", 1), ("e5m2", "e5m2", 0)):
        spec = QuantSpec(format=weight, activation=activation, group_size="channel")
        compiled = compiled_linear(16, shape, abstract_weight(shape, spec))
        assert len(compiled.matmuls("fp8_matmul")) == products and len(compiled.matmuls("matmul")) == 1 - products
