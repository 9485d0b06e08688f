"""The engine that runs wherever torch does: one transformers model, its weights overwritten in place.

The model is built once. `load` merges a recipe tensor by tensor into the model's parameters and writes
only those whose merge operation changed since the last candidate; a checksum of every tensor written is
read back from the model. Nothing touches the disk.

Generation runs in left-padded batches; rows that have ended leave the batch. On a CPU the prompts of a
batch are read in small parts of like length, whose caches are then joined: less padding, and activations
that stay near the processor.

Imports: torch, transformers; `merge`, `sources`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evomerge.engine.base import (
    Completion,
    GenerateRequest,
    Likelihood,
    LikelihoodRequest,
    Loaded,
)
from evomerge.engine.prompts import PromptEncoder
from evomerge.errors import EngineError
from evomerge.merge.fingerprint import checksum, combine
from evomerge.merge.merger import Merger
from evomerge.merge.methods import SPECS
from evomerge.merge.plan import MergePlan
from evomerge.recipe import Recipe
from evomerge.sources.layout import Layout

# Tokens, padding included, of one forward pass over prompts on a CPU. SmolLM2-135M reads a token 10 % faster
# at 400 than at 2,000 on the development machine; the padding saved comes on top.
CPU_PROMPT_TOKENS = 512


def pick_device(device: str) -> str:
    """`auto` becomes cuda, mps or cpu, the first that there is.

    Raises:
        EngineError: the device asked for is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name, there in present.items() if there)
    if not present.get(device.split(":")[0], False):
        have = ", ".join(name for name, there in present.items() if there)
        raise EngineError(f"`engine.device` is {device!r}, but this machine has: {have}")
    return device


def pick_dtype(dtype: str, device: str) -> str:
    """`auto` on a CPU without AMX becomes float32: products in bfloat16 are the slower ones there."""
    if dtype != "auto" or device != "cpu":
        return dtype
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "auto" if capabilities.get("amx_bf16") else "float32"


class TransformersEngine:
    """Holds one candidate in a transformers causal language model.

    Args:
        folder: the base model's folder (configuration, weights, tokenizer).
        merger: materializes candidates; its sources' base is the model in `folder`.
        layout: cells of the base model.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: of the model while it runs: `bfloat16`, `float16`, `float32` or `auto`: as stored on an
            accelerator, see `pick_dtype` for the CPU. Candidates are rounded to the checkpoint's dtype
            in any case, so that what is scored is what is exported.
        batch_tokens: most tokens, padding included, in one forward pass over prompts.

    Raises:
        EngineError: the device is absent, or transformers renames this architecture's tensors.
    """

    def __init__(
        self,
        folder: Path,
        merger: Merger,
        layout: Layout,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 8192,
    ) -> None:
        import transformers

        self.device = pick_device(device)
        self._merger, self._layout, self._batch_tokens = merger, layout, batch_tokens
        with _quiet(transformers), _machine_errors("building the model"):
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=pick_dtype(dtype, self.device)
            )
            self.model.to(self.device).eval().requires_grad_(False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.prompts = PromptEncoder(tokenizer, self.model.generation_config.eos_token_id)
        cache = transformers.DynamicCache(config=self.model.config)
        plain = all(type(layer) is transformers.cache_utils.DynamicLayer for layer in cache.layers)
        self._prompt_tokens = CPU_PROMPT_TOKENS if plain and self.device == "cpu" else batch_tokens
        self._weights = _weights_by_name(self.model, layout)
        self._held: dict[str, str] = {}
        self._checksums: dict[str, int] = {}
        self._info = {
            "engine": "transformers",
            "device": self.device,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }

    @property
    def info(self) -> Mapping[str, Any]:
        """Versions, device and dtype."""
        return self._info

    @torch.no_grad()
    def load(self, recipe: Recipe) -> Loaded:
        """Merge `recipe` into the model; see `Engine.load`."""
        start = time.perf_counter()
        plan = MergePlan.compile(recipe, self._layout, SPECS)
        changed = {op.tensor: op for op in self._merger.changed(plan, self._held)}
        with _machine_errors("merging"):
            for name, tensor in self._merger.materialize(plan, only=changed):
                weight = self._weights.get(name)
                if weight is None:
                    continue
                # Until the copy is known to be complete, the old operation must not count as held.
                self._held.pop(name, None)
                weight.copy_(tensor)
                self._checksums[name] = checksum(tensor.to(weight.dtype))
                self._held[name] = self._merger.digest(changed[name])
            self._verify(changed)
        return Loaded(time.perf_counter() - start, len(changed), combine(self._checksums))

    def _verify(self, names: Iterable[str]) -> None:
        for name in names:
            weight = self._weights.get(name)
            if weight is not None and checksum(weight) != self._checksums[name]:
                self._held.pop(name)
                raise EngineError(
                    f"tensor `{name}`: the engine does not hold what was merged (checksum differs after the "
                    "copy); the trial is not scored. If it happens again, test this machine's memory"
                )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that the engine holds, under its checkpoint name (not a copy)."""
        yield from self._weights.items()

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Completions; see `Engine.generate`."""
        encoded = [self.prompts.encode(r) for r in requests]
        answers: list[Completion | None] = [None] * len(requests)
        with _machine_errors("generating"):
            # Alike budgets and lengths side by side: little padding, and rows that end together.
            order = sorted(range(len(requests)), key=lambda i: (requests[i].max_tokens, len(encoded[i])))
            for batch in _batches(order, [len(e) for e in encoded], self._batch_tokens):
                for i, completion in self._generate_batch(batch, requests, encoded):
                    answers[i] = completion
        return [answer for answer in answers if answer is not None]

    def _generate_batch(
        self, batch: Sequence[int], requests: Sequence[GenerateRequest], encoded: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Completion]]:
        """Left-padded decoding of the requests numbered in `batch`."""
        rows = sorted(batch, key=lambda i: len(encoded[i]))
        written: dict[int, list[int]] = {i: [] for i in rows}
        draws = {i: Draws(requests[i]) for i in rows if requests[i].temperature > 0.0}
        logits, mask, position, cache = self._read([encoded[i] for i in rows])
        while True:
            keep = []
            chosen = logits.argmax(-1)
            for row, i in enumerate(rows):
                if i in draws:
                    chosen[row] = draws[i].token(logits[row])
            for row, (i, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                written[i].append(token)
                completion = self.prompts.finish(written[i], requests[i])
                if completion is None:
                    keep.append(row)
                else:
                    yield i, completion
            if not keep:
                return
            if len(keep) < len(rows):
                index = torch.tensor(keep, device=chosen.device)
                cache.batch_select_indices(index)
                chosen, mask, position = chosen[index], mask[index], position[index]
                rows = [rows[row] for row in keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            position = position[:, -1:] + 1
            logits, cache = self._step(chosen[:, None], mask, position, cache)

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """Logits `(rows, vocabulary)`, mask `(rows, longest)`, last positions `(rows, 1)` and cache."""
        lengths = [len(prompt) for prompt in prompts]
        parts = []
        for part in _batches(range(len(prompts)), lengths, self._prompt_tokens):
            tokens, mask = self._pad([prompts[i] for i in part])
            parts.append(self._step(tokens, mask, mask.long().cumsum(-1).sub_(1).clamp_(min=0), None))
        mask = self._pad(prompts)[1]
        position = mask.sum(-1, keepdim=True) - 1
        return torch.cat([logits for logits, _ in parts]), mask, position, _joined([c for _, c in parts])

    def _step(
        self, tokens: torch.Tensor, mask: torch.Tensor, position: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """One forward pass: logits of every row's next token `(rows, vocabulary)`, and the cache."""
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1], out.past_key_values

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        """Log-likelihoods; see `Engine.loglikelihood`."""
        pairs = [self.prompts.encode_pair(r) for r in requests]
        lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
        result: list[Likelihood | None] = [None] * len(requests)
        with _machine_errors("scoring"):
            order = sorted(range(len(requests)), key=lambda i: (len(pairs[i][1]), lengths[i]))
            for batch in _batches(order, lengths, self._prompt_tokens):
                tokens, mask = self._pad([[*pairs[i][0], *pairs[i][1]] for i in batch])
                longest = max(len(pairs[i][1]) for i in batch)
                out = self.model(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=mask.long().cumsum(-1).sub_(1).clamp_(min=0),
                    use_cache=False,
                    logits_to_keep=longest + 1,
                )
                logp = out.logits[:, :-1].float().log_softmax(-1)
                taken = logp.gather(-1, tokens[:, -longest:, None]).squeeze(-1).double()
                for row, i in enumerate(batch):
                    count = len(pairs[i][1])
                    result[i] = Likelihood(float(taken[row, longest - count :].sum()), count)
        return [r for r in result if r is not None]

    def _pad(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded token ids and attention mask, both `(rows, longest)` int64."""
        longest = max(len(s) for s in sequences)
        pad = self.prompts.pad_id
        tokens = [[pad] * (longest - len(s)) + list(s) for s in sequences]
        mask = [[0] * (longest - len(s)) + [1] * len(s) for s in sequences]
        return torch.tensor(tokens, device=self.device), torch.tensor(mask, device=self.device)

    def close(self) -> None:
        """Drop the model and the cached task vectors."""
        self._weights, self._held = {}, {}
        self._merger.forget()
        self.model = None
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


class Draws:
    """Draws the tokens of one answer; no generator but its own is used."""

    def __init__(self, request: GenerateRequest) -> None:
        self._temperature, self._top_p = request.temperature, request.top_p
        self._random = random.Random(request.seed)

    def token(self, logits: torch.Tensor) -> int:
        """A token of the softmax of `logits` `(vocabulary,)`, cut at top_p (Holtzman, arXiv:1904.09751)."""
        likely, tokens = logits.double().div(self._temperature).softmax(-1).sort(descending=True)
        reach = likely.cumsum(-1)
        count = int((reach - likely < self._top_p).sum())  # the first always
        at = torch.searchsorted(reach[:count], self._random.random() * float(reach[count - 1]), right=True)
        return int(tokens[min(int(at), count - 1)])


def _weights_by_name(model: Any, layout: Layout) -> dict[str, torch.Tensor]:
    """The model's tensors under their checkpoint names; tied copies that a checkpoint stores are left out."""
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [name for name in layout.tensors if name not in state]
    if missing:
        raise EngineError(
            f"tensor `{missing[0]}` of the checkpoint has another name inside transformers ({len(missing)} "
            "such tensors), so candidates cannot be written in place; this architecture is not supported yet"
        )
    return {name: state[name].data for name in layout.tensors if name not in tied}


def _joined(caches: Sequence[Any]) -> Any:
    """One cache with the rows of all, in order, each moved to the right end of the longest."""
    first = caches[0]
    if len(caches) == 1:
        return first
    longest = max(cache.get_seq_length() for cache in caches)
    for at, layer in enumerate(first.layers):
        for name in ("keys", "values"):
            parts = [getattr(cache.layers[at], name) for cache in caches]
            padded = [torch.nn.functional.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in parts]
            setattr(layer, name, torch.cat(padded))
    return first


def _batches(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Cut `order` into runs whose padded size (rows x longest) stays within `most` tokens."""
    batch: list[int] = []
    longest = 0
    for i in order:
        longest = max(longest, lengths[i])
        if batch and longest * (len(batch) + 1) > most:
            yield batch
            batch, longest = [], lengths[i]
        batch.append(i)
    if batch:
        yield batch


@contextmanager
def _machine_errors(doing: str) -> Iterator[None]:
    """Running out of memory is the machine's failure, not the recipe's."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(f"out of accelerator memory while {doing}; lower `engine.batch_tokens`") from error
    except MemoryError as error:
        raise EngineError(f"out of memory while {doing}; lower `engine.batch_tokens`") from error
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise EngineError(f"out of memory while {doing}; lower `engine.batch_tokens`") from error
        raise


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no advice on standard error while the model is built."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
