"""`measure`: open a model, run it over texts, and write what was found as a statistics file.

Imports: torch, `engine`, `merge`, `sources`, `evomerge.statistics`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from evomerge.engine.transformers_engine import TransformersEngine, pick_device
from evomerge.errors import ConfigError, EngineError, SourceError
from evomerge.merge.merger import Merger
from evomerge.recipe import Recipe, Setting
from evomerge.sources.checkpoint import hash_files
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from evomerge.sources.statistics import FISHER, GRAM
from evomerge.statistics.fisher import ESTIMATORS, Estimator, diagonal_fisher
from evomerge.statistics.gram import gram_bytes, input_grams, shared_inputs
from evomerge.statistics.texts import Tokens, choose, read_texts

MEASURED = (FISHER, GRAM)
FORMAT = "1"  # version of the file's form
PACKAGES = ("evomerge", "torch", "transformers")


@dataclass(frozen=True)
class Options:
    """How a model is measured.

    Attributes:
        kinds: `fisher`, `gram` or both.
        estimator: of the Fisher information: `sampled` or `empirical`, see `diagonal_fisher`.
        max_length: most tokens of one text, at least 2.
        max_tokens: texts are taken until this many tokens are reached.
        batch: texts in one forward pass for Gram matrices; the Fisher information takes one at a time.
        seed: of the order of the texts and of the sampled tokens.
        exclude: regular expression; tensors in whose name it is found are left out. None: no tensor.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: of the model while it runs, as `TransformersEngine` takes it.
    """

    kinds: tuple[str, ...] = (FISHER,)
    estimator: Estimator = "sampled"
    max_length: int = 512
    max_tokens: int = 32_768
    batch: int = 8
    seed: int = 0
    exclude: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Raise `ConfigError` for a value that is not allowed."""
        unknown = [kind for kind in self.kinds if kind not in MEASURED]
        if unknown or not self.kinds:
            raise ConfigError(
                f"--kind is {', '.join(unknown) or 'nothing'}; what can be measured is {', '.join(MEASURED)}"
            )
        if self.estimator not in ESTIMATORS:
            raise ConfigError(f"--estimator is {self.estimator!r}; it can be {' or '.join(ESTIMATORS)}")
        for name, least in (("max_length", 2), ("max_tokens", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it must be at least {least}")
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise ConfigError(f"--exclude is {self.exclude!r}, no regular expression ({error})") from error


@dataclass(frozen=True)
class Measured:
    """What was written.

    Attributes:
        file: the statistics file.
        tensors: number of tensors by kind.
        texts: number of texts that were used.
        tokens: number of their tokens.
    """

    file: Path
    tensors: Mapping[str, int]
    texts: int
    tokens: int


def measure(
    model: SourceRef,
    texts: Path,
    out: Path,
    *,
    base: SourceRef | None = None,
    options: Options | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Measure a model on texts and write the statistics to `out`.

    Args:
        model: a full model, or an adapter, which is merged into `base` in memory.
        texts: as `read_texts` reads them.
        out: does not exist.
        base: of an adapter.
        options: None is `Options()`.
        progress: told of the tokens done and of all, a text counting once for each kind.

    Raises:
        ConfigError: an option or a file is wrong, or the statistics need more memory than is free.
        SourceError: the model cannot be opened.
        EngineError: the device is absent, or out of memory.
    """
    options = options or Options()
    options.check()
    if out.exists():
        raise ConfigError(f"{out}: exists already; remove it or choose another --out")
    rows = read_texts(texts)
    sources = _open(model, base)
    net, tokenizer = _load(sources, options)
    chosen = choose(
        rows, tokenizer, max_length=options.max_length, max_tokens=options.max_tokens, seed=options.seed
    )
    parameters = {name for name, _ in net.named_parameters()}
    names = [
        name
        for name in sources.tensor_names
        if name in parameters and not (options.exclude and re.search(options.exclude, name))
    ]
    owners = shared_inputs(net, names, chosen) if GRAM in options.kinds else {}
    _check_memory(_needed(net, names, owners, options.kinds), net.device)
    tensors = _run(net, names, set(owners.values()), chosen, options, progress)
    shared = {name: owner for name, owner in owners.items() if name != owner and f"{GRAM}/{owner}" in tensors}
    facts = _facts(sources, texts, chosen, options, str(net.dtype))
    _write(out, tensors, {**facts, "shared": json.dumps(shared)})
    counts = {kind: sum(key.startswith(f"{kind}/") for key in tensors) for kind in options.kinds}
    return Measured(out, counts, len(chosen), sum(len(tokens.ids) for tokens in chosen))


def _open(model: SourceRef, base: SourceRef | None) -> SourceSet:
    if model.adapter is None:
        if base is not None:
            raise ConfigError(f"--base is given, but `{model.text}` is a full model; remove --base")
        return SourceSet.open(model, {}, "model")
    if base is None:
        raise ConfigError(
            f"`{model.text}` is an adapter; give the model that it was trained from with --base"
        )
    return SourceSet.open(base, {"model": model})


def _load(sources: SourceSet, options: Options) -> tuple[Any, Any]:
    """The model, its adapter merged in, and its tokenizer, in transformers."""
    import transformers

    layout, folder = sources.layout(), sources.base.folder
    merger = Merger(sources, device=pick_device(options.device))
    try:
        engine = TransformersEngine(folder, merger, layout, device=options.device, dtype=options.dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(f"`{folder}` cannot be opened by transformers: {error}") from error
    if sources.models:
        whole = Setting("task_arithmetic", {}, {"model": {"weight": 1.0}})
        engine.load(Recipe(sources.base_name, sources.models, dict.fromkeys(layout.by_cell, whole)))
    return engine.model, tokenizer


def _needed(
    net: Any, names: Sequence[str], owners: Mapping[str, str], kinds: Collection[str]
) -> dict[str, int]:
    """Bytes by what takes them, largest first."""
    parameters = dict(net.named_parameters())
    sizes = {}
    if FISHER in kinds:
        sizes = {f"{FISHER}/{name}": 4 * parameters[name].numel() for name in names}
    if GRAM in kinds:
        sizes.update({f"{GRAM}/{name}": size for name, size in gram_bytes(net, owners).items()})
    return dict(sorted(sizes.items(), key=lambda row: -row[1]))


def _check_memory(sizes: Mapping[str, int], device: torch.device) -> None:
    """Refuse to begin what cannot end: activations and gradients come on top of `sizes`."""
    needed, free = sum(sizes.values()), free_bytes(device)
    if needed > free:
        largest = ", ".join(f"`{name}` {size / 1e9:.2g} GB" for name, size in list(sizes.items())[:3])
        raise ConfigError(
            f"the statistics need {needed / 1e9:.2g} GB beside the model, but {free / 1e9:.2g} GB are free "
            f"on {device.type} (largest: {largest}); leave tensors out, as with `--exclude down_proj`, make "
            "one --kind at a time, or use a larger machine"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that is free now where the model is."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _run(
    net: Any,
    names: Sequence[str],
    linear: Collection[str],
    chosen: Sequence[Tokens],
    options: Options,
    progress: Callable[[int, int], None],
) -> dict[str, torch.Tensor]:
    total = len(options.kinds) * sum(len(tokens.ids) for tokens in chosen)
    done = 0

    def tell(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    tensors: dict[str, torch.Tensor] = {}
    try:
        if FISHER in options.kinds:
            found = diagonal_fisher(
                net, names, chosen, estimator=options.estimator, seed=options.seed, progress=tell
            )
            tensors.update({f"{FISHER}/{name}": tensor.cpu() for name, tensor in found.items()})
        if GRAM in options.kinds:
            found = input_grams(net, linear, chosen, batch=options.batch, progress=tell)
            tensors.update({f"{GRAM}/{name}": tensor.cpu() for name, tensor in found.items()})
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise EngineError("out of memory; lower --max-length or --batch, or use --exclude") from error
    odd = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if odd:
        raise EngineError(
            f"`{odd[0]}` ({len(odd)} such) has values that are not finite in {net.dtype}; use --dtype float32"
        )
    return tensors


def _facts(
    sources: SourceSet, texts: Path, chosen: Sequence[Tokens], options: Options, dtype: str
) -> dict[str, str]:
    """Metadata of the file: all that its numbers depend on."""
    hashes = sources.hashes()
    facts = {
        "format": "pt",
        "evomerge_statistics": FORMAT,
        "kinds": " ".join(options.kinds),
        "model_sha256": hashes["model"],
        "texts_sha256": hash_files([texts]),
        "texts": str(len(chosen)),
        "tokens": str(sum(len(tokens.ids) for tokens in chosen)),
        "scored_tokens": str(sum(tokens.scored for tokens in chosen)),
        "estimator": options.estimator,
        "max_length": str(options.max_length),
        "seed": str(options.seed),
        "dtype": dtype.removeprefix("torch."),
        "versions": json.dumps({name: metadata.version(name) for name in PACKAGES}),
    }
    return facts | ({"base_sha256": hashes["base"]} if "base" in hashes else {})


def _write(out: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    temporary = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), temporary, dict(facts))
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{out}: cannot be written ({error}); choose another --out") from error
