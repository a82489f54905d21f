"""What torch takes for the parts of bench_model.py, in an environment of its own that needs nothing of this project.

    python scripts/bench_model_torch.py --part "generate, bfloat16" --model DIR --windows FILE --output FILE ...

"quantize" is llm-compressor's GPTQ (INT4, groups of 64, act-order); the others are Transformers. Writes figures by name
as JSON.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS = 4  # windows that are evaluated together


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True, help="quantize; evaluate or generate, a comma and a dtype")
    for name, said in (("model", "Hugging Face folder"), ("windows", "windows.npz"), ("output", "file of figures")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=said)
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="rows that generate together")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate for each row")
    options = parser.parse_args()
    windows = {name: torch.from_numpy(tokens).long() for name, tokens in np.load(options.windows).items()}
    part, _, dtype = options.part.partition(", ")
    model = load(options.model, getattr(torch, dtype or "float32"))
    if part == "quantize":
        figures = quantize(model, windows["calibration"])
    elif part == "evaluate":
        figures = evaluate(model, windows["evaluation"])
    else:
        figures = generate(model, windows["evaluation"].flatten(), options)
    figures["peak memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    options.output.write_text(json.dumps(figures))


def load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def quantize(model: Any, calibration: torch.Tensor) -> dict[str, float]:
    """Without loading and saving."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    rows = [{"input_ids": one[None], "attention_mask": torch.ones_like(one[None])} for one in calibration]
    scheme = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    began = time.perf_counter()
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(rows, batch_size=None),
        recipe=GPTQModifier(config_groups=scheme, ignore=["lm_head"], actorder="static"),
        num_calibration_samples=len(rows),
        max_seq_length=calibration.shape[1],
        shuffle_calibration_samples=False,
    )
    return {"without start-up, s": time.perf_counter() - began}


@torch.no_grad()
def evaluate(model: Any, windows: torch.Tensor) -> dict[str, float]:
    """Losses of all windows, behind a first batch."""

    def run(rows: torch.Tensor) -> None:
        logits = model(rows, use_cache=False).logits[:, :-1].float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()

    run(windows[:ROWS])
    began = time.perf_counter()
    for rows in windows.split(ROWS):
        run(rows)
    return {"tokens/s": len(windows) * (windows.shape[1] - 1) / (time.perf_counter() - began)}


@torch.no_grad()
def generate(model: Any, tokens: torch.Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Greedy, each number of rows once to warm up."""
    figures = {}
    for rows in options.rows:
        prompts = tokens[: rows * options.prompt].view(rows, options.prompt)
        arguments = dict(attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0)

        def seconds(count: int, prompts: Any = prompts, arguments: Any = arguments) -> float:
            began = time.perf_counter()
            model.generate(prompts, min_new_tokens=count, max_new_tokens=count, **arguments)
            return time.perf_counter() - began

        seconds(2)
        first, whole = seconds(1), seconds(options.new_tokens)
        figures[f"prefill, {rows} rows, tokens/s"] = rows * options.prompt / first
        figures[f"decode, {rows} rows, tokens/s"] = rows * (options.new_tokens - 1) / (whole - first)
    return figures


if __name__ == "__main__":
    main()
