"""Train the LoRA experts of this example; their result is committed in `adapters/`.

    python examples/smollm2/train_experts.py [NAME ...] [--out FOLDER]

Needs the base model (`python examples/smollm2/base.py`) and peft. `RECIPES` holds every
hyperparameter. The loss is that of the answer's tokens and of the end token; the prompt
is plain text without the chat template, as in `fitness/spanish_math.yaml`.

The run is seeded, but sums of floating-point numbers depend on the machine and on its
number of threads: a retrained adapter scores alike and is not equal bit by bit.

Imports: torch, transformers, peft, and `data.py` beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import data
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
BASE = HERE / "base"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
N_LAYERS = 30
WARM_UP = 20  # steps from 0 to the full learning rate, which then falls linearly to 0
SEED = 0


class Recipe(NamedTuple):
    """Hyperparameters of one expert.

    steps: optimiser steps of `batch` fresh examples each.
    batch: examples a step.
    learning_rate: AdamW's, at its highest.
    rank: of the adapter; `alpha` is always twice the rank, so deltas are 2 * B @ A.
    weight_decay: AdamW's, per step times the learning rate.
    layers: which of the 30 layers the adapter touches.
    modules: which linear maps of these layers it touches.
    """

    steps: int
    batch: int
    learning_rate: float
    rank: int
    weight_decay: float
    layers: range
    modules: tuple[str, ...] = LINEAR


RECIPES = {
    "math": Recipe(320, 8, 2e-3, 12, 0.0, range(N_LAYERS)),
    "spanish": Recipe(150, 12, 2e-3, 12, 0.0, range(N_LAYERS)),
    "extract": Recipe(40, 16, 3e-3, 12, 0.0, range(N_LAYERS)),
}


def batches(
    task: str, examples: list[data.Example], size: int, tokenizer: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Cut `examples` into steps, padded on the right to the longest of each step.

    Yields:
        Token ids, attention mask and labels, all `(size, length)` int64; a label is
        -100 wherever the token is none of the answer.
    """
    for start in range(0, len(examples), size):
        rows = []
        for example in examples[start : start + size]:
            end = tokenizer.eos_token if example.ends else ""
            prompt = tokenizer(example.prompt(task))["input_ids"]
            answer = tokenizer(f" {example.answer}{end}")["input_ids"]
            rows.append((prompt + answer, [-100] * len(prompt) + answer))
        length = max(len(ids) for ids, _ in rows)
        pad = tokenizer.eos_token_id
        yield (
            torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
            torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
        )


def answer_loss(model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens; logits are made for these alone."""
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])


def train(name: str, recipe: Recipe, out: Path) -> float:
    """Train one expert, write its adapter to `out / name`, return the seconds it took."""
    started = time.monotonic()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(recipe.modules),
        layers_to_transform=None if len(recipe.layers) == N_LAYERS else list(recipe.layers),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, (recipe.steps - step) / recipe.steps),
    )
    examples = data.training_examples(name, recipe.steps * recipe.batch, seed=SEED)
    for step, batch in enumerate(batches(name, examples, recipe.batch, tokenizer), start=1):
        loss = answer_loss(adapted.get_base_model(), *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == recipe.steps:
            seconds = time.monotonic() - started
            print(f"{name}: step {step}/{recipe.steps}, loss {loss:.3f}, {seconds:.0f} s")
            sys.stdout.flush()
    save(adapted, out / name)
    return time.monotonic() - started


def save(adapted: Any, folder: Path) -> None:
    """Write the adapter in bfloat16: its weights and its configuration, nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    adapted.peft_config["default"].base_model_name_or_path = BASE_NAME
    with tempfile.TemporaryDirectory() as scratch:
        adapted.save_pretrained(scratch)
        tensors = load_file(Path(scratch) / "adapter_model.safetensors")
        save_file(
            {key: value.to(torch.bfloat16).contiguous() for key, value in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config = json.loads((Path(scratch) / "adapter_config.json").read_text(encoding="utf-8"))
        config["target_modules"].sort()  # peft writes a set
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def main() -> int:
    """Train the experts named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(description="Train the experts of this example.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, default=HERE / "adapters", help="default: adapters/")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in RECIPES]
    if unknown:
        parser.error(f"no expert is called {unknown[0]!r}; choose from {', '.join(RECIPES)}")
    if not (BASE / "config.json").is_file():
        parser.error(f"{BASE} holds no model; run `python examples/smollm2/base.py` first")
    logging.disable_progress_bar()
    for name in arguments.names or RECIPES:
        seconds = train(name, RECIPES[name], arguments.out)
        print(f"{name}: {seconds:.0f} s, in {arguments.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
