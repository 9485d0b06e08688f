"""The engine's process: vLLM, its workers with the merger inside, and the prompts.

    python -m evomerge.engine.vllm_host FD FD

Answers messages of `engine.vllm_engine`. vLLM's engine core runs in this process; so does its worker, where
there is only one. Before the first candidate the engine has to pass a test with known answers.

Imports: vllm, transformers; `engine`, `errors`, `merge`, `sources`.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evomerge.engine import vllm_compat
from evomerge.engine.base import GenerateRequest, LikelihoodRequest
from evomerge.engine.child import Message, raise_told, serve, told
from evomerge.engine.memory import MemoryPlan, plan_accelerator, plan_host
from evomerge.engine.prompts import PromptEncoder
from evomerge.engine.transformers_engine import pick_dtype
from evomerge.errors import ConfigError, EngineError, EvomergeError

EXTENSION = "evomerge.engine.vllm_worker.Extension"
PROBES, PROBE_TOKENS, PROBE_ANSWER = 4, 160, 8  # prompts of the known-answer test: number, length, answer
MEMORY_SECONDS = 60.0  # to wait for accelerator memory that a killed engine held


class Host:
    """Answers one message at a time."""

    def __init__(self) -> None:
        self._alive: Callable[[], None] = lambda: None
        self._llm: Any = None
        self._comparable = False

    def answer(self, message: Message, alive: Callable[[], None]) -> Message:
        """Carry a message out; errors are answers, after most of which the other side ends this process."""
        self._alive = alive
        try:
            done: Message = getattr(self, message["do"])(**message["with"])
        except EvomergeError as error:
            return told(error)
        except Exception as error:
            traceback.print_exc()
            return told(EngineError(f"vLLM failed: {type(error).__name__}: {_first_line(error)}"))
        return done

    def start(
        self,
        *,
        folder: str,
        dtype: str,
        options: Mapping[str, Any],
        sources: Mapping[str, Any],
        memory: Mapping[str, Any],
        base_recipe: Mapping[str, Any],
        probe_recipe: Mapping[str, Any] | None,
    ) -> Message:
        """Start vLLM with the base model, open the sources in its workers, test it."""
        import vllm
        from vllm.platforms import current_platform

        vllm_compat.check_options(options)
        plan = _memory_plan(options, **memory)
        arguments = vllm_compat.defaults(options, plan.vllm_share)
        if not current_platform.is_cpu():
            _await_memory(float(arguments["gpu_memory_utilization"]))
        try:
            dtype = pick_dtype(dtype, current_platform.device_type)
            self._llm = vllm.LLM(model=folder, dtype=dtype, worker_extension_cls=EXTENSION, **arguments)
        except (ValueError, TypeError, RuntimeError, OSError, AssertionError) as error:
            raise EngineError(f"vLLM does not start: {_first_line(error)}") from error
        self._alive()
        config = self._llm.llm_engine.vllm_config
        self._longest = config.model_config.max_model_len
        self._prompts = _encoder(folder)
        before = self._probe()
        kept = {"cache_bytes": plan.cache_bytes, "host_bytes": plan.host_bytes}
        self._ask_workers("evomerge_open", json.dumps({**sources, **kept}))
        self._comparable = self._known_answers(before, base_recipe, probe_recipe)
        return {
            "info": {
                "engine": "vllm",
                "vllm": vllm.__version__,
                "device": current_platform.device_type,
                "dtype": str(config.model_config.dtype).removeprefix("torch."),
                "max_model_len": self._longest,
                "workers": config.parallel_config.world_size,
                "task vectors": f"{plan}, each worker",
                "weights checked": "every swap" if self._comparable else "at the start only",
            }
        }

    def load(self, *, recipe: Mapping[str, Any]) -> Message:
        """Merge a recipe into the weights, drop cached keys and values, compare."""
        start = time.perf_counter()
        # Where sums cannot tell what is held, nothing may be taken for granted.
        reports = self._load(recipe, whole=not self._comparable)
        if self._comparable and not _agree(reports):
            raise EngineError(
                "the engine does not hold what was merged (the sums of the weights differ); the trial is not "
                "scored. If it happens again, test this machine's memory"
            )
        slowest = max(reports, key=lambda report: float(report["merge_seconds"] + report["swap_seconds"]))
        return {
            "seconds": time.perf_counter() - start,
            "tensors": slowest["tensors"],
            "fingerprint": slowest["fingerprint"],
            "parts": {key: slowest[f"{key}_seconds"] for key in ("merge", "swap", "check")},
        }

    def generate(self, *, requests: Sequence[Mapping[str, Any]]) -> Message:
        """Completions as `[text, tokens, finish]`."""
        from vllm import SamplingParams

        wanted = [GenerateRequest(**{**request, "stop": tuple(request["stop"])}) for request in requests]
        ends = sorted(self._prompts.eos_ids)
        ids = [self._prompts.encode(request) for request in wanted]
        for request, prompt in zip(wanted, ids, strict=True):
            self._check_length(len(prompt) + request.max_tokens, request.prompt)
        parameters = [
            SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed if request.temperature else None,
                max_tokens=request.max_tokens,
                stop=list(request.stop),
                stop_token_ids=ends,
                detokenize=bool(request.stop),
                skip_special_tokens=True,
            )
            for request in wanted
        ]
        completions = []
        for request, output in zip(wanted, self._run(ids, parameters), strict=True):
            tokens = list(output.outputs[0].token_ids)
            completion = self._prompts.finish(tokens, request)
            if completion is None:
                raise EngineError(
                    f"vLLM ended an answer after {len(tokens)} of {request.max_tokens} tokens without a stop "
                    f"text or an end of turn (reason: {output.outputs[0].finish_reason})"
                )
            completions.append([completion.text, completion.tokens, completion.finish])
        return {"completions": completions}

    def loglikelihood(self, *, requests: Sequence[Mapping[str, Any]]) -> Message:
        """Likelihoods as `[nats, tokens]`."""
        from vllm import SamplingParams

        wanted = [LikelihoodRequest(**request) for request in requests]
        pairs = [self._prompts.encode_pair(request) for request in wanted]
        for request, (prompt, answer) in zip(wanted, pairs, strict=True):
            self._check_length(len(prompt) + len(answer) + 1, request.prompt)
        one = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._run([(*prompt, *answer) for prompt, answer in pairs], [one] * len(pairs))
        likelihoods = []
        for (prompt, answer), output in zip(pairs, outputs, strict=True):
            rows = output.prompt_logprobs[len(prompt) :]
            total = sum(row[token].logprob for row, token in zip(rows, answer, strict=True))
            likelihoods.append([float(total), len(answer)])
        return {"likelihoods": likelihoods}

    def _run(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any]) -> list[Any]:
        """All requests at once; vLLM batches them."""
        outputs: list[Any] = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            list(parameters),
            use_tqdm=_progress(self._alive),
        )
        return outputs

    def _check_length(self, tokens: int, prompt: str) -> None:
        if tokens > self._longest:
            raise ConfigError(
                f"a prompt and its answer take up to {tokens} tokens, but `engine.options.max_model_len` is "
                f"{self._longest}; raise it, or lower the task's `max_tokens`. The prompt begins: "
                f"{prompt[:60]!r}"
            )

    def _load(self, recipe: Mapping[str, Any], *, whole: bool) -> list[dict[str, Any]]:
        """Reports of the workers on a recipe; keys and values of other weights are dropped."""
        reports = self._ask_workers("evomerge_load", json.dumps({"recipe": recipe, "whole": whole}))
        self._forget()
        return reports

    def _ask_workers(self, method: str, argument: str) -> list[dict[str, Any]]:
        answers = [json.loads(answer) for answer in self._llm.collective_rpc(method, args=(argument,))]
        self._alive()
        for answer in answers:
            raise_told(answer)
        return answers

    def _forget(self) -> None:
        """Drop keys and values that other weights made."""
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM does not drop its prefix cache; scores would mix two candidates")

    def _probe(self) -> list[Any]:
        """Greedy answers to made-up prompts, longer than a cache block.

        Raises:
            EngineError: a part of a prompt was found in the prefix cache.
        """
        from vllm import SamplingParams

        length = min(PROBE_TOKENS, self._longest - PROBE_ANSWER)
        vocabulary = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()
        prompts = [[(97 * i + 31 * k + 7) % vocabulary for i in range(length)] for k in range(PROBES)]
        greedy = SamplingParams(temperature=0.0, max_tokens=PROBE_ANSWER, ignore_eos=True, detokenize=False)
        outputs = self._run(prompts, [greedy] * PROBES)
        if any(output.num_cached_tokens for output in outputs):
            raise EngineError(
                "vLLM answers with keys and values that other weights made: its prefix cache was not dropped"
            )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _known_answers(
        self,
        before: list[Any],
        base: Mapping[str, Any],
        candidate: Mapping[str, Any] | None,
    ) -> bool:
        """Base, candidate, base: the base has to answer as it did when vLLM had loaded it.

        Returns whether the sums of weights can be compared from now on: they cannot where vLLM changes
        values while it loads them.

        Raises:
            EngineError: the answers differ, or were taken from another candidate's cache.
        """
        reports = []
        for recipe in (base, candidate, base):
            if recipe is not None:
                reports.append(self._load(recipe, whole=True))
                after = self._probe()
        if after != before:
            raise EngineError(
                "the base model answers differently after a candidate was loaded and the base restored; "
                "candidates cannot be scored with this model, vLLM version and options"
            )
        self._forget()
        same = all(_agree(each) for each in reports)
        if not same and _agree(reports[0]):
            raise EngineError(
                "the engine does not hold what was merged (the sums of the weights differ after a swap)"
            )
        return same


def _progress(alive: Callable[[], None]) -> type:
    """vLLM's progress bar, drawn nowhere; it tells that the engine lives."""
    from tqdm import tqdm

    class Progress(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords, file=io.StringIO())
            self._told = time.monotonic()

        def update(self, n: float | None = 1) -> bool | None:
            if time.monotonic() - self._told > 1.0:
                self._told = time.monotonic()
                alive()
            shown: bool | None = super().update(n)
            return shown

    return Progress


def _agree(reports: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the workers hold together what was merged."""
    held = sum(report["held"] for report in reports)
    return bool((held - reports[0]["merged"]) % 2**64 == 0)


def _encoder(folder: str) -> PromptEncoder:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    try:
        ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # a model without generation_config.json
        ends = transformers.AutoConfig.from_pretrained(folder).eos_token_id
    return PromptEncoder(tokenizer, ends)


def _memory_plan(options: Mapping[str, Any], weights: int, deltas: int, cache_gb: float | None) -> MemoryPlan:
    """The memory plan of each worker."""
    from vllm.platforms import current_platform

    workers = vllm_compat.workers(options)
    if current_platform.is_cpu():
        return plan_host(cache_gb, workers)
    total = int(current_platform.get_device_total_memory())
    return plan_accelerator(total, weights, deltas, cache_gb, workers)


def _await_memory(share: float) -> None:
    """Wait until the accelerator has as much free memory as vLLM is going to take."""
    import torch

    limit = time.monotonic() + MEMORY_SECONDS
    while time.monotonic() < limit:
        free, total = torch.cuda.mem_get_info()
        if free >= share * total:
            return
        time.sleep(1.0)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__


def main(host: Host, fds: Sequence[str]) -> None:
    """Serve until the other side closes, then end everything that was started."""
    try:
        serve(fds, host.answer)
    finally:
        sys.stdout.flush()
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Host(), sys.argv[1:])
