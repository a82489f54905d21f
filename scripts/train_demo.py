"""Train a demo model and its tokenizer, and write them in the Hugging Face layout.

    python scripts/train_demo.py --architecture llama --wikitext DIR --c4 FILE.jsonl --work-dir DIR

Text: WikiText-2 train, the C4 sample (all but its last tenth) and CPython's documentation (pydoc topics and the
docstrings of the standard library). Validation: WikiText-2 validation, that last tenth, and the topics that
``fpq_jax._checkpoints.demo`` holds back. Started again with the same --work-dir it goes on from the last checkpoint,
also to more --steps than before, under their schedule.
"""

import ast
import json
import math
import platform
import sysconfig
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.flax import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fpq_jax import perplexity
from fpq_jax._checkpoints.demo import demo_topics  # private: the demo's own files and texts
from fpq_jax.models.parameters import params_of, to_hf_tensors
from fpq_jax.models.registry import model_class_of

LENGTH = 512
_COMMON = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
HF_CONFIGS = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_COMMON,
        "intermediate_size": 704,  # 2.75 groups of 256: several groups in a row, the last one shorter
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    },
    "opt": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        **_COMMON,
        "ffn_dim": 1024,
        "word_embed_proj_dim": 256,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "dropout": 0.0,
        "pad_token_id": 1,
    },
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a demo model."""

    architecture: Literal["llama", "opt"]
    wikitext: Path
    """Folder with wiki.train.tokens and wiki.valid.tokens."""
    c4: Path
    """C4 sample, one JSON document a line."""
    work_dir: Path
    """Checkpoints, tokens and the log."""
    output: Path | None = None
    """By default models/demo_llama or models/demo_opt."""
    steps: int = 1600
    batch_size: int = 8
    learning_rate: float = 3e-3
    evaluate_every: int = 200
    validation_windows: int = 48
    """Of each validation text, at most."""
    seed: int = 0


def _forward(model: Any, tokens: Any) -> Any:
    return model(tokens)


def docstrings() -> list[str]:
    """Every docstring of the standard library's modules, tests excepted, in the order of their files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
    texts = []
    for path in sorted(root.rglob("*.py")):
        if excluded & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        texts.append("\n\n".join(doc for doc in found if doc))
    return [text for text in texts if text]


def corpus(options: Options) -> tuple[list[str], dict[str, list[str]]]:
    """Training documents, and validation documents by source."""
    wiki = lambda name: (options.wikitext / name).read_text(encoding="utf-8")
    c4 = [json.loads(line)["text"] for line in options.c4.read_text(encoding="utf-8").splitlines()]
    cut = len(c4) * 9 // 10
    articles = wiki("wiki.train.tokens").split("\n \n = ")
    train = articles + c4[:cut] + demo_topics(held_out=False) + docstrings()
    valid = {"wikitext2": [wiki("wiki.valid.tokens")], "c4": c4[cut:], "pydoc": demo_topics(held_out=True)}
    return train, valid


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """A byte-level BPE tokenizer that puts <s> in front of each text, in Hugging Face's files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_COMMON["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def make_optimizer(options: Options) -> optax.GradientTransformation:
    """Muon for the kernels, Adam for the embedding and the norms; warm-up and cosine decay."""
    is_kernel = lambda path, _: optax.contrib.MuonDimensionNumbers() if "kernel" in jax.tree_util.keystr(path) else None
    return optax.contrib.muon(
        optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, options.steps // 20, options.steps, 1e-5),
        consistent_rms=0.2,
        weight_decay=0.1,
        adam_b2=0.98,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(is_kernel, params),
    )


def train(options: Options, tokens: np.ndarray, valid: dict[str, np.ndarray]) -> Any:
    """The model after ``options.steps`` steps, going on from the last checkpoint in the work folder."""
    hf_config = HF_CONFIGS[options.architecture]
    model_class = model_class_of(hf_config)
    config = model_class.Config.from_hf(hf_config)
    graph, state = nnx.split(model_class(config, dtype=jnp.float32, rngs=nnx.Rngs(options.seed)))
    optimizer = make_optimizer(options)
    opt_state = optimizer.init(state)

    def loss_fn(state, windows):
        logits = nnx.merge(graph, state)(windows).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], windows[:, 1:]).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(state, opt_state, windows):
        loss, grads = jax.value_and_grad(loss_fn)(state, windows)
        updates, opt_state = optimizer.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, loss

    folder = (options.work_dir / "checkpoints").absolute()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        start = manager.latest_step() or 0
        if start:
            restored = manager.restore(start, args=ocp.args.StandardRestore({"state": state, "opt_state": opt_state}))
            state, opt_state = restored["state"], restored["opt_state"]
        with Progress(*columns) as progress:
            bar = progress.add_task("training", total=options.steps, completed=start)
            began = time.time()
            for i in range(start, options.steps):
                # the draw depends on the step alone, so a resumed run sees what an undisturbed one would
                offsets = np.random.default_rng((options.seed, i)).integers(0, len(tokens) - LENGTH, options.batch_size)
                windows = np.stack([tokens[o : o + LENGTH] for o in offsets]).astype(np.int32)
                state, opt_state, loss = step(state, opt_state, windows)
                progress.update(bar, advance=1)
                done = i + 1
                if done % options.evaluate_every == 0 or done == options.steps:
                    model = nnx.merge(graph, state)
                    losses = {name: math.log(perplexity(_forward, model, text).value) for name, text in valid.items()}
                    row = {"step": done, "train": float(loss), "valid": losses, "seconds": round(time.time() - began)}
                    with (options.work_dir / "log.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    progress.console.print(row)
                    manager.save(done, args=ocp.args.StandardSave({"state": state, "opt_state": opt_state}))
            manager.wait_until_finished()
    return nnx.merge(graph, state)


def write_model(model: Any, hf_config: dict[str, Any], folder: Path) -> None:
    """bf16 safetensors under Hugging Face's names, and config.json."""
    tensors = to_hf_tensors(type(model), params_of(model))
    tensors = {name: jnp.asarray(value, jnp.bfloat16) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")


def main(options: Options) -> None:
    options.work_dir.mkdir(parents=True, exist_ok=True)
    output = options.output or Path("models") / f"demo_{options.architecture}"
    output.mkdir(parents=True, exist_ok=True)
    texts, valid_texts = corpus(options)
    if not (output / "tokenizer.json").exists():
        train_tokenizer(texts, output)
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    encode = lambda documents: np.concatenate([e.ids for e in tokenizer.encode_batch(documents)])
    order = np.random.default_rng(options.seed).permutation(len(texts))
    tokens = encode([texts[i] for i in order]).astype(np.uint16)
    valid = {}
    for name, documents in valid_texts.items():
        ids = encode(documents).astype(np.int32)
        valid[name] = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)[: options.validation_windows]
    print(f"Python {platform.python_version()}: {len(tokens):,} training tokens; validation windows:")
    print({name: len(windows) for name, windows in valid.items()})
    write_model(train(options, tokens, valid), HF_CONFIGS[options.architecture], output)


if __name__ == "__main__":
    main(tyro.cli(Options))
