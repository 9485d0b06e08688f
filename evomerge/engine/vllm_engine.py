"""The vLLM engine: candidates are merged inside the workers of a vLLM that is started once.

This side imports neither torch nor vLLM. It keeps a process (`engine.vllm_host`) and sends it recipes and
requests. A process that fails, hangs or is killed is ended with all that it started; the trial is FAILED and
the next one starts a new process.

Imports: `engine`, `errors`, `recipe`, `sources`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evomerge.engine import vllm_compat
from evomerge.engine.base import (
    Completion,
    GenerateRequest,
    Likelihood,
    LikelihoodRequest,
    Loaded,
)
from evomerge.engine.child import Child, Message, raise_told
from evomerge.engine.memory import delta_bytes
from evomerge.errors import EngineError, RecipeError
from evomerge.recipe import Recipe, Setting
from evomerge.sources.layout import Layout
from evomerge.sources.source_set import SourceSet

START_SECONDS = 1800.0  # longest silence while vLLM starts: a large model is read, graphs are captured
CLOSE_SECONDS = 5.0  # for an idle process to end by itself


class VllmEngine:
    """Holds one candidate in vLLM; see `Engine`.

    Args:
        sources: the base model and the models; recipes name them.
        layout: cells of the base model.
        dtype: of the model while it runs, or `auto`.
        options: arguments of vLLM by name, as `vllm.LLM` takes them.
        cache_gb: memory for task vectors in all workers together; None: see `engine.memory`.
        timeout: longest silence in seconds before a working engine counts as hung.
        log: file for vLLM's output; None: a temporary one.
        host: module that is run as the engine's process, and arguments before its own.

    Raises:
        ConfigError: an option that vLLM has not got.
        EngineError: vLLM is not installed, does not start, or fails the known-answer test.
    """

    def __init__(
        self,
        sources: SourceSet,
        layout: Layout,
        *,
        dtype: str = "auto",
        options: Mapping[str, Any] | None = None,
        cache_gb: float | None = None,
        timeout: float = 600.0,
        log: Path | None = None,
        host: str = "evomerge.engine.vllm_host",
    ) -> None:
        vllm_compat.version()
        self._options = dict(options or {})
        self._timeout, self._host = timeout, host
        self._log = log or Path(tempfile.mkdtemp(prefix="evomerge-")) / "engine.log"
        base = Recipe(sources.base_name, sources.models, {}, modules=layout.extra_modules)
        self._start_message: Message = {
            "folder": str(sources.folders[sources.base_name]),
            "dtype": dtype,
            "options": self._options,
            "sources": _spec(sources),
            "memory": {"weights": sources.base.bytes, "deltas": delta_bytes(sources), "cache_gb": cache_gb},
            "base_recipe": base.as_json(),
            "probe_recipe": _first_model(base, layout),
        }
        self._child: Child | None = None
        self._info: Mapping[str, Any] = {}
        self._start()

    @property
    def info(self) -> Mapping[str, Any]:
        """Versions, device, dtype and options."""
        return {**self._info, "options": self._options}

    @property
    def pid(self) -> int | None:
        """Process id of the engine's process, which leads a session of its own; None while there is none."""
        return None if self._child is None else self._child.pid

    def load(self, recipe: Recipe) -> Loaded:
        """Merge `recipe` inside the workers; see `Engine.load`. A dead engine is started again."""
        if self._child is None:
            self._start()
        return Loaded(**self._ask("load", {"recipe": recipe.as_json()}, self._timeout))

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Completions; see `Engine.generate`."""
        answer = self._ask("generate", {"requests": [asdict(r) for r in requests]}, self._timeout)
        return [Completion(*completion) for completion in answer["completions"]]

    def loglikelihood(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        """Log-likelihoods; see `Engine.loglikelihood`."""
        answer = self._ask("loglikelihood", {"requests": [asdict(r) for r in requests]}, self._timeout)
        return [Likelihood(*likelihood) for likelihood in answer["likelihoods"]]

    def close(self) -> None:
        """End the process and all that it started."""
        if self._child is not None:
            child, self._child = self._child, None
            child.end(CLOSE_SECONDS)

    def _start(self) -> None:
        command = [sys.executable, "-m", *self._host.split()]
        self._child = Child(command, vllm_compat.environment(self._options), self._log)
        self._info = self._ask("start", self._start_message, START_SECONDS)["info"]

    def _ask(self, do: str, arguments: Message, seconds: float) -> Message:
        """Raises what the process answers; ends it unless the recipe alone is to blame."""
        if self._child is None:
            raise EngineError("the engine holds no candidate: its process has ended; load a recipe first")
        try:
            answer = self._child.ask({"do": do, "with": arguments}, seconds)
            raise_told(answer)
        except RecipeError:
            raise
        except BaseException:
            child, self._child = self._child, None
            child.end()
            raise
        return answer


def _spec(sources: SourceSet) -> Message:
    """What a worker opens: folders on this machine, so that nothing is looked up twice."""
    references = {
        name: {
            ref.key: str(sources.folders[name]),
            "statistics": [str(Path(path).expanduser()) for path in ref.statistics],
        }
        for name, ref in sources.refs.items()
    }
    base = references.pop(sources.base_name)
    return {"base": base, "models": references, "base_name": sources.base_name}


def _first_model(base: Recipe, layout: Layout) -> Message | None:
    """The first model alone, for the known-answer test; None without models."""
    if not base.models:
        return None
    setting = Setting("task_arithmetic", {}, {base.models[0]: {"weight": 1.0}})
    cells = dict.fromkeys(layout.by_cell, setting)
    return Recipe(base.base, base.models, cells, modules=base.modules).as_json()
