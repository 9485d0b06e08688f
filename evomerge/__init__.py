"""Search for the best way to merge fine-tuned language models that share a base.

The public names below are loaded on first use: `import evomerge` loads neither torch nor optuna nor vllm.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "EvomergeError": "evomerge.errors",
    "Recipe": "evomerge.recipe",
    "RunConfig": "evomerge.config",
    "SearchSpace": "evomerge.space",
    "Suite": "evomerge.evaluate.task",
    "Study": "evomerge.study.study",
    "evaluate_model": "evomerge.model",
    "load_config": "evomerge.config",
    "merge_model": "evomerge.model",
    "resume_search": "evomerge.build",
    "run_search": "evomerge.build",
}

__all__ = sorted([*_WHERE, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'evomerge' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
