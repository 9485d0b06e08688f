"""The vLLM engine on tiny real models: the answers of transformers, and a watch that sees what breaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from evomerge.build import Parts, Run, make_engine
from evomerge.config import load_config
from evomerge.engine import vllm_compat
from evomerge.engine.base import Engine, GenerateRequest, LikelihoodRequest
from evomerge.engine.child import living
from evomerge.engine.factory import open_engine, transformers_engine
from evomerge.engine.vllm_engine import VllmEngine
from evomerge.errors import ConfigError, EngineError, RecipeError
from evomerge.export.bundle import export_model
from evomerge.merge.fingerprint import checksum, combine
from evomerge.recipe import Recipe, Setting
from evomerge.sources.source_set import SourceSet
from evomerge.study.storage import JOURNAL, TrialLog
from evomerge.study.study import Observer, Study
from evomerge.study.trial import Outcome, Trial
from tests.tiny import tiny_family
from tests.world import World

pytestmark = pytest.mark.skipif(
    not vllm_compat.installed(), reason="vLLM is not installed; `make test` installs it on Linux"
)
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"max_model_len": 256, "kv_cache_memory_bytes": 1 << 27}
PROMPTS = ["a b c", "a", "d e f g h i j k", "b b", "c a d", "the rain in the north" * 3]


@pytest.fixture(scope="module", autouse=True)
def one_thread_in_the_engine() -> Iterator[None]:
    """Tensors are tiny; threads that wait for work would take the processor from the tests beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> SourceSet:
    return tiny_family(tmp_path_factory.mktemp("sources"))


def started(sources: SourceSet, *, broken: str | None = None, **arguments: object) -> VllmEngine:
    command = f"tests.engine.broken_hosts {broken}" if broken else "evomerge.engine.vllm_host"
    options = {**OPTIONS, **arguments.pop("options", {})}  # type: ignore[dict-item]
    keywords = {"dtype": "float32", "cache_gb": 0.1, **arguments}
    return VllmEngine(sources, sources.layout(), options=options, host=command, **keywords)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(sources: SourceSet) -> Iterator[VllmEngine]:
    made = started(sources)
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference(sources: SourceSet) -> Iterator[Engine]:
    made = transformers_engine(sources, sources.layout(), device="cpu", dtype="float32", cache_gb=0.1)
    yield made
    made.close()


def children() -> set[int]:
    """Processes that run below this one; those of the module's own engine among them."""
    return {process.pid for process in living(psutil.Process().children(recursive=True))}


def everywhere(sources: SourceSet, method: str, **models: dict[str, float]) -> Recipe:
    cells = sources.layout().by_cell
    return Recipe("base", sources.models, dict.fromkeys(cells, Setting(method, {}, models)), seed=5)


def recipes(sources: SourceSet) -> list[Recipe]:
    both = {"full": {"weight": 0.6, "density": 0.5}, "adapter": {"weight": 0.9, "density": 0.7}}
    return [
        Recipe("base", sources.models, {}),
        everywhere(sources, "task_arithmetic", full={"weight": 1.0}),
        everywhere(sources, "dare_ties", **both),
    ]


@pytest.mark.parametrize("number", range(3))
def test_greedy_answers_are_those_of_transformers(
    engine: VllmEngine, reference: Engine, sources: SourceSet, number: int
):
    requests = [
        GenerateRequest(prompt, 4 + i, chat=i % 2 == 0, stop=("e",) if i == 3 else ())
        for i, prompt in enumerate(PROMPTS)
    ]
    for each in (engine, reference):
        each.load(recipes(sources)[number])
    assert engine.generate(requests) == reference.generate(requests)


@pytest.mark.parametrize("number", range(3))
def test_loglikelihoods_are_those_of_transformers(
    engine: VllmEngine, reference: Engine, sources: SourceSet, number: int
):
    requests = [LikelihoodRequest(p, " and more", chat=i % 2 == 0) for i, p in enumerate(PROMPTS)]
    for each in (engine, reference):
        each.load(recipes(sources)[number])
    ours, theirs = engine.loglikelihood(requests), reference.loglikelihood(requests)
    assert [each.tokens for each in ours] == [each.tokens for each in theirs]
    assert [each.total for each in ours] == pytest.approx([each.total for each in theirs], abs=1e-4)


def test_a_candidate_that_changes_the_tied_embedding_changes_the_output_layer_too(
    engine: VllmEngine, reference: Engine, sources: SourceSet
):
    """vLLM packs a tied output layer once for the CPU and does not load it again."""
    cells = [cell for cell in sources.layout().by_cell if cell.module == "embedding"]
    recipe = Recipe(
        "base",
        sources.models,
        dict.fromkeys(cells, Setting("task_arithmetic", {}, {"full": {"weight": 3.0}})),
    )
    request = [LikelihoodRequest("a b c", " d e")]
    for each in (engine, reference):
        each.load(recipe)
    assert engine.loglikelihood(request)[0].total == pytest.approx(
        reference.loglikelihood(request)[0].total, abs=1e-4
    )


def in_layer(sources: SourceSet, layer: int, weight: float) -> Recipe:
    cells = [cell for cell in sources.layout().by_cell if cell.layer == layer]
    setting = Setting("task_arithmetic", {}, {"full": {"weight": weight}})
    return Recipe("base", sources.models, dict.fromkeys(cells, setting))


def test_only_layers_that_differ_are_loaded_and_the_answers_are_those_of_transformers(
    engine: VllmEngine, reference: Engine, sources: SourceSet
):
    of_layer = [name for name in sources.tensor_names if ".layers.1." in name]
    requests = [GenerateRequest(prompt, 6) for prompt in PROMPTS]
    engine.load(in_layer(sources, 1, 0.5))
    for recipe, tensors in [
        (in_layer(sources, 1, 0.5), 0),
        (in_layer(sources, 1, 2.5), len(of_layer)),
        (in_layer(sources, 0, 2.5), 2 * len(of_layer)),
    ]:
        assert engine.load(recipe).tensors == tensors
        reference.load(recipe)
        assert engine.generate(requests) == reference.generate(requests)


def test_a_wrong_tensor_is_noticed_where_a_part_of_the_model_is_loaded(sources: SourceSet):
    engine = started(sources, broken="LaterStream")
    engine.load(in_layer(sources, 0, 0.5))
    with pytest.raises(EngineError, match="does not hold what was merged"):
        engine.load(in_layer(sources, 1, 0.5))
    engine.close()


def test_drawn_answers_are_drawn_again_alike(engine: VllmEngine, sources: SourceSet):
    engine.load(recipes(sources)[0])
    requests = [GenerateRequest("a b c", 12, temperature=2.0, seed=seed) for seed in (5, 6)]
    one, other = engine.generate(requests)
    assert engine.generate([*requests, GenerateRequest("a", 3)])[:2] == [one, other]
    assert one != other


def test_what_is_exported_has_the_fingerprint_of_what_was_loaded(
    engine: VllmEngine, sources: SourceSet, tmp_path: Path
):
    """Promise 1: DARE's masks are the same in the worker and in the export."""
    recipe = recipes(sources)[2]
    loaded = engine.load(recipe)
    out = export_model(tmp_path / "out", recipe, sources, sources.layout(), max_shard_bytes=10**9)
    exported = load_file(out / "model.safetensors")
    assert combine({name: checksum(tensor) for name, tensor in exported.items()}) == loaded.fingerprint


def test_every_swap_is_checked(engine: VllmEngine):
    assert engine.info["weights checked"] == "every swap"


def test_equal_recipes_have_equal_fingerprints(engine: VllmEngine, sources: SourceSet):
    _, one, other = recipes(sources)
    first = engine.load(one).fingerprint
    assert engine.load(other).fingerprint != first
    assert engine.load(one).fingerprint == first


def test_a_recipe_that_is_not_finite_is_infeasible_and_the_engine_goes_on(
    engine: VllmEngine, sources: SourceSet
):
    pid = engine.pid
    engine.load(recipes(sources)[0])
    request = [GenerateRequest("a b c", 8)]
    before = engine.generate(request)
    with pytest.raises(RecipeError, match="tensor `model"):
        engine.load(everywhere(sources, "task_arithmetic", full={"weight": 1e300}))
    engine.load(recipes(sources)[0])
    assert engine.generate(request) == before
    assert engine.pid == pid


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("StaleCache", "keys and values that other weights made"),
        ("StaleStream", "layer `model.layers.1.mlp.down_proj` was not loaded"),
        ("OtherStream", "does not hold what was merged|answers differently"),
        ("StalePacking", "computes with other weights than were loaded"),
    ],
)
def test_what_is_stale_is_noticed_before_the_first_candidate(
    sources: SourceSet, broken: str, said: str, tmp_path: Path
):
    with pytest.raises(EngineError, match=said):
        started(sources, broken=broken, log=tmp_path / "log")


def test_an_option_that_vllm_has_not_got_is_named(sources: SourceSet):
    with pytest.raises(ConfigError, match=r"not an argument of vLLM; did you mean `gpu_memory_utilization`"):
        started(sources, options={"gpu_memory_utilisation": 0.5})


def test_an_option_that_evomerge_sets_is_refused_before_anything_starts(sources: SourceSet):
    with pytest.raises(ConfigError, match=r"`engine.options.dtype` is set by evomerge; .* `engine.dtype`"):
        open_engine(sources, sources.layout(), kind="vllm", options={"dtype": "float16"})


def test_an_engine_that_cannot_start_says_why_and_leaves_nothing_behind(sources: SourceSet):
    before = children()
    with pytest.raises(EngineError, match=r"vLLM does not start: .*tensor parallel size"):
        started(sources, options={"tensor_parallel_size": 3})
    assert children() == before


def test_a_hung_engine_is_ended_after_the_timeout(sources: SourceSet):
    engine = started(sources, broken="Hanging", timeout=3.0)
    pid = engine.pid
    with pytest.raises(EngineError, match="no sign of life for 3 s"):
        engine.generate([GenerateRequest("a", 4)])
    assert pid is not None
    assert not psutil.pid_exists(pid)
    engine.close()


def test_a_prompt_that_is_too_long_names_the_option(sources: SourceSet):
    engine = started(sources, options={"max_model_len": 128}, dtype="bfloat16")
    assert (engine.info["dtype"], engine.info["weights checked"]) == ("bfloat16", "every swap")
    engine.load(recipes(sources)[2])
    with pytest.raises(ConfigError, match=r"up to 14\d tokens, but `engine.options.max_model_len` is 128"):
        engine.generate([GenerateRequest("x" * 130, 16)])
    engine.close()


def test_an_engine_killed_in_mid_generation_is_started_again_with_the_next_candidate(sources: SourceSet):
    others, engine = children(), started(sources)
    engine.load(recipes(sources)[1])
    request = [GenerateRequest("a b c", 8)]
    before, pid = engine.generate(request), engine.pid
    assert pid is not None
    many = [GenerateRequest("ab" * (1 + i % 25), 200) for i in range(600)]
    threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(EngineError, match="ended by SIGKILL"):
        engine.generate(many)
    with pytest.raises(EngineError, match="load a recipe first"):
        engine.generate(request)
    engine.load(recipes(sources)[1])
    assert engine.generate(request) == before
    assert engine.pid != pid
    engine.close()
    assert children() == others


def test_two_workers_hold_together_what_one_holds(sources: SourceSet, reference: Engine):
    engine = started(sources, options={"tensor_parallel_size": 2})
    assert engine.info["weights checked"] == "every swap"
    requests = [GenerateRequest(prompt, 6) for prompt in PROMPTS]
    for recipe in recipes(sources)[1:]:
        engine.load(recipe)
        reference.load(recipe)
        assert engine.generate(requests) == reference.generate(requests)
    tree = psutil.Process(engine.pid).children(recursive=True)
    engine.close()
    assert len(tree) >= 2
    assert living(tree) == []


def test_a_killed_search_leaves_no_engine_behind(sources: SourceSet):
    base = sources.folders["base"]
    code = f"""
from evomerge.engine.vllm_engine import VllmEngine
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
sources = SourceSet.open(SourceRef(model={str(base)!r}), {{}})
engine = VllmEngine(sources, sources.layout(), dtype="float32", options={OPTIONS!r})
print(engine.pid, flush=True)
import time; time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    limit = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)


def test_a_search_whose_engine_is_killed_twice_goes_on_and_loses_no_trial(world: World):
    world.run["engine"] = {"kind": "vllm", "dtype": "float32", "cache_gb": 0.1, "options": OPTIONS}
    world.run["budget"] = {"trials": 16}
    world.write()
    parts, others = Parts.open(load_config(world.run_file)), children()
    warnings: list[str] = []

    class Killer(Observer):
        def trial(self, study: Study, trial: Trial) -> None:
            """Kill the engine after two of the trials."""
            if trial.number in (3, 9):
                os.kill(engine.pid or 0, signal.SIGKILL)

    with Run(parts, say=warnings.append) as run:
        engine = make_engine(parts, run.engine)
        assert isinstance(engine, VllmEngine)
        result = run.search(engine, Killer())
        engine.close()
    assert children() == others
    assert sum("ended by SIGKILL" in warning for warning in warnings) == 2
    outcome = json.loads((world.run_dir / "outcome.json").read_text(encoding="utf-8"))
    assert outcome["winner"] == result.winner.label
    assert (world.run_dir / "engine.log").stat().st_size
    log = TrialLog(str(world.run_dir / JOURNAL), world.run_file.stem)
    assert Outcome.FAILED not in {trial.outcome for trial in log}
    assert [trial.number for trial in log] == list(range(len(log)))
    log.close()
