"""Shapes and types of annotated functions are checked throughout the tests; a tiny LLaMA folder to work on."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def xla_knows(flag: str) -> bool:
    """Whether this jaxlib has the flag: one that it has not ends the process."""
    line = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(line, env=os.environ | {"XLA_FLAGS": flag}, capture_output=True, check=False).returncode == 0


# tests' programs run once or twice each: optimizing them takes longer than running them. (At level 0 products and sums
# are not contracted, as they are otherwise, and some tests compare bits.) XLA's former emitters compile in half the
# time; a jaxlib that has lost their flag, as .ci/run's newer Python has, runs the tests with those that users have.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    _flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=1"]
    if xla_knows(_former := "--xla_cpu_use_fusion_emitters=false"):
        _flags.append(_former)
    os.environ["XLA_FLAGS"] = " ".join(_flags).strip()
os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # of LAPACK: workers beside each other wait for its threads otherwise
# tests of all workers, and the processes that they start, compile each program once
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="fpq-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# where arrays are handled; specs and recipes check what they are given themselves, and are tested with nonsense
_CHECKED = {
    "_numerics": ("formats", "scales", "qtensor", "activations"),
    "_matmul": ("linear", "products", "fp4_kernel"),
    "_algorithms": (
        "gptq",
        "metric",
        "lorc",
        "joint",
        "scale_search",
        "coordinate_descent",
        "error_propagation",
        "fisher",
        "fp8_table",
        "quantize_linears",
        "output_error",
        "statistics",
    ),
    "_generation": ("generator",),
    "_transform": (
        "interpreter",
        "quantized",
        "find_kernels",
        "recorder",
        "accumulate",
        "hessians",
        "params",
        "blocks",
        "conversion",
    ),
    "_pipeline": (
        "batches",
        "layerwise",
        "predictions",
        "backward",
        "calibration",
        "quantize_layers",
        "text",
        "perplexity",
    ),
}
install_import_hook(
    [*(f"fpq_jax.{room}.{name}" for room, names in _CHECKED.items() for name in names), "fpq_jax.models"],
    "beartype.beartype",
)

_MAPPINGS = 20_000

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}

OPT_CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 300,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def mostly_full(values, quick: int) -> list:
    """Parameters of a test: the first ``quick`` are of the quick tier, the others of the full one."""
    values = list(values)
    of = lambda value: value if isinstance(value, tuple) else (value,)
    return values[:quick] + [pytest.param(*of(value), marks=pytest.mark.full) for value in values[quick:]]


def forward(model, tokens):
    """A model as a function of its parameters."""
    return model(tokens)


def write_tokenizer(folder: Path) -> None:
    """A byte tokenizer of 258 tokens that puts <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def random_tensors(config: dict, seed: int = 0, scale: float = 3.0) -> dict:
    """Random weights under Hugging Face's names, larger than at the start of training so that logits differ."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from fpq_jax.models.parameters import params_of, to_hf_tensors
    from fpq_jax.models.registry import model_class_of

    model_class = model_class_of(config)
    model = model_class(model_class.Config.from_hf(config), dtype=jnp.float32, rngs=nnx.Rngs(seed))
    key = jax.random.key(seed + 1)
    params = {
        path: leaf * scale if leaf.ndim > 1 else leaf + 0.1 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        for i, (path, leaf) in enumerate(params_of(model).items())
    }
    return {name: np.array(tensor) for name, tensor in to_hf_tensors(model_class, params).items()}


def write_checkpoint(folder: Path, config: dict, tensors: dict) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def assert_logits_equal_hugging_faces(folder: Path, config: dict) -> None:
    """Of a random model of this configuration, in float32; skipped where torch is not installed."""
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    import jax
    import jax.numpy as jnp
    import transformers

    from fpq_jax import load

    write_checkpoint(folder, config, random_tensors(config))
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    tokens = np.random.default_rng(0).integers(2, config["vocab_size"], (3, 50))
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.numpy()
    got = np.asarray(jax.jit(lambda t: load(folder)(t))(jnp.asarray(tokens)))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def assert_a_cache_gives_the_same_logits(folder: Path, config: dict) -> None:
    """Of tokens given in pieces, as of tokens given at once, on a random model of this configuration."""
    import jax.numpy as jnp

    from fpq_jax import load

    model = load(write_checkpoint(folder, config, random_tensors(config)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 20)))
    whole = model(tokens)
    cache = model.init_cache(2, 24, jnp.float32)
    for start, end in ((0, 7), (7, 8), (8, 20)):
        logits, cache = model(tokens[:, start:end], cache, jnp.int32(start))
        np.testing.assert_allclose(logits, whole[:, start:end], atol=2e-5 * float(jnp.abs(whole).max()))


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow tests, and those that need torch or hopper")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: of the second tier, which --full runs instead of the first")


def pytest_collection_modifyitems(config, items):
    """Without --full the quick tests alone, with it the others alone."""
    wanted = [item for item in items if bool(item.get_closest_marker("full")) == config.getoption("--full")]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """What was compiled is let go of, file by file, when there is much of it: each program has mapped memory, and a
    process may have 65,530 mappings on Linux."""
    yield
    import gc

    import jax

    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > _MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    """A Hugging Face folder of a random LLaMA with two layers."""
    return write_checkpoint(tmp_path / "tiny", TINY_CONFIG, random_tensors(TINY_CONFIG))


@pytest.fixture
def tiny_opt(tmp_path: Path) -> Path:
    """A Hugging Face folder of a random OPT with two layers."""
    return write_checkpoint(tmp_path / "tiny-opt", OPT_CONFIG, random_tensors(OPT_CONFIG))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Some 6,000 characters."""
    import random

    random.seed(0)
    words = "the a quick brown fox jumps over lazy dogs and runs through green fields of barley".split()
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.choices(words, k=1200)))
    return path


@pytest.fixture(scope="session")
def hopper_compiler() -> None:
    """XLA's compiler for an H100. Elsewhere its tests are skipped, in CI (where CI is set) they must run."""
    import jax

    from fpq_jax import FpqError
    from fpq_jax.debug import compile_for_hopper

    try:
        compile_for_hopper(lambda x: x + 1, jax.ShapeDtypeStruct((4,), "float32"))
    except FpqError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the hopper extra is not installed ({error})")


def abstract_quantized(config: dict, spec, *, rank: int = 0, weights: str = "fp8", mesh=None):
    """A model of a configuration in bfloat16, its decoder Linears quantized, prepared; no memory is used."""
    import jax
    import jax.numpy as jnp

    from fpq_jax import lorc, prepare, quantize_array
    from fpq_jax.models.parameters import abstract_model, params_of, with_params
    from fpq_jax.models.registry import model_class_of

    known = {}

    def quantized(w):
        def make(w):
            q = quantize_array(w, spec)
            return lorc(w, q, rank=rank) if rank else q

        if w.shape not in known:
            known[w.shape] = jax.eval_shape(make, w)
        return known[w.shape]

    model_class = model_class_of(config)
    model = abstract_model(model_class, model_class.Config.from_hf(config), jnp.bfloat16)
    if spec is not None:
        chosen = lambda path: path.startswith("layers.") and path.endswith("kernel")
        params = params_of(model)
        model = with_params(model, {p: quantized(leaf) if chosen(p) else leaf for p, leaf in params.items()})
    return prepare(model, weights, mesh=mesh)
