"""What llm-compressor's GPTQ loses, on the windows of tokens that frontier.py wrote.

    python scripts/frontier_peers.py --model DIR --windows FILE --output DIR

Runs in an environment of its own, which needs nothing of this project: pip install llmcompressor==0.14.0. Groups of 32
and 64 of INT4 (and of 128, where they divide all inputs), activations as they are or in FP8, and FP8 for both. Each
scheme that is finished is kept in --output, and the same command started again goes on behind it.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import log_softmax

GROUPS = (32, 64, 128)
ROWS = 4  # windows that run together
TEXT = "eval "  # before a text's name among the windows


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, said in (("model", "Hugging Face folder"), ("windows", "windows.npz"), ("output", "folder of results")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=said)
    options = parser.parse_args()
    windows = dict(np.load(options.windows))
    calibration = windows.pop("calibration")
    texts = {name.removeprefix(TEXT): torch.from_numpy(tokens).long() for name, tokens in windows.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    model = load(options.model)
    sizes = [module.weight.shape for module in linears(model)]
    original: dict[str, list[torch.Tensor]] = {}
    for series, name, bits, scheme, gptq in schemes(sizes):
        path = options.output / f"{series}, {name}.json"
        if path.is_file():
            continue
        if not original:
            original = {text: list(hidden_states(model, tokens)) for text, tokens in texts.items()}
        began = time.perf_counter()
        quantized = quantize(load(options.model), calibration, scheme, gptq)
        seconds = round(time.perf_counter() - began, 1)
        measured = {text: measure(model, original[text], quantized, tokens) for text, tokens in texts.items()}
        partial = path.with_suffix(".partial")
        point = {"series": series, "name": name, "bits": bits, "seconds": seconds, "texts": measured}
        partial.write_text(json.dumps(point, indent=2))
        os.replace(partial, path)
        print(series, name, bits, seconds, json.dumps(measured), flush=True)


def schemes(sizes: list[tuple[int, int]]) -> Iterator[tuple[str, str, float, dict[str, Any], bool]]:
    """Series, name, stored bits of a weight (16 for a scale), the scheme, and whether it is GPTQ's."""
    int4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    dynamic = fp8 | {"strategy": "token", "dynamic": True}
    for group in GROUPS:
        if all(inputs % group == 0 for _, inputs in sizes):
            weights = int4 | {"group_size": group}
            yield "llm-compressor, GPTQ W4A16", f"groups of {group}", 4 + 16 / group, {"weights": weights}, True
            scheme = {"weights": weights, "input_activations": dynamic}
            yield "llm-compressor, GPTQ W4AFP8", f"groups of {group}", 4 + 16 / group, scheme, True
    bits = 8 + 16 * sum(outputs for outputs, _ in sizes) / sum(outputs * inputs for outputs, inputs in sizes)
    scheme = {"weights": fp8 | {"strategy": "channel"}, "input_activations": dynamic}
    yield "llm-compressor, FP8 dynamic", "channels", bits, scheme, False


def quantize(model: Any, calibration: np.ndarray, scheme: dict[str, Any], gptq: bool) -> Any:
    """The model with all its Linears but the head in the scheme; GPTQ in the order of the activations."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    groups = {"group_0": scheme | {"targets": ["Linear"]}}
    if not gptq:
        return oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    rows = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in torch.from_numpy(calibration).long()]
    return oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(rows, batch_size=1),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder="static"),
        num_calibration_samples=len(rows),
        max_seq_length=calibration.shape[1],
        shuffle_calibration_samples=False,
    )


def load(folder: Path) -> Any:
    """The model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def linears(model: Any) -> list[Any]:
    """Those that are quantized."""
    return [one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"]


@torch.no_grad()
def hidden_states(model: Any, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Those that the head sees, by windows that run together."""
    for rows in tokens.split(ROWS):
        yield model.model(rows, use_cache=False).last_hidden_state


@torch.no_grad()
def measure(original: Any, states: list[torch.Tensor], model: Any, tokens: torch.Tensor) -> dict[str, float]:
    """Perplexity by the windows' tokens but each one's first, mean divergence from the original in nats, and the share
    of tokens of which the most likely next one is the original's."""
    sums = np.zeros(3)
    for rows, theirs, ours in zip(tokens.split(ROWS), states, hidden_states(model, tokens), strict=True):
        for row, one, other in zip(rows, theirs, ours, strict=True):
            p, q = (log_softmax(m.lm_head(x[:-1]).float(), dim=-1) for m, x in ((original, one), (model, other)))
            nll = -q.gather(1, row[1:, None]).double().sum()
            kl = (p.exp() * (p - q)).sum(dim=-1).double().sum()
            sums += [float(nll), float(kl), float((p.argmax(-1) == q.argmax(-1)).sum())]
    nll, kl, same = sums / (tokens.shape[0] * (tokens.shape[1] - 1))
    return {"perplexity": float(np.exp(nll)), "kl_divergence": float(kl), "same_token": float(same)}


if __name__ == "__main__":
    main()
