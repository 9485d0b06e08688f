"""The run file that `evomerge init` writes: every section with its defaults and what they mean.

Imports: `errors`.
"""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import ConfigError

TEMPLATE = """\
# A run of evomerge. Relative paths count from this file. Check it with: evomerge check THIS_FILE
# The run writes into a folder beside this file that has its name.

base_model: path/to/base            # a model folder, or a hub id: {model: org/name, revision: abc123}

models:                             # two or more fine-tuned relatives of the base; any mix of
  math: path/to/math-model          #   model folders and hub ids (full checkpoints)
  code: {adapter: path/to/adapter}  #   LoRA adapters, used without writing a merged copy

fitness: path/to/fitness.yaml       # tasks and their items; see fitness/ in the repository for examples

items:                              # most items per task; null takes all
  calibration: null                 #   what the search sees
  selection: null                   #   fresh items on which the winner is chosen
  held_out: null                    #   scored once, for the report

budget:                             # the first limit that is reached ends the search
  time: 8h                          #   also 90m, or `until 07:30`; the final part is kept back from it
  # trials: 500                     #   candidates, fixed recipes included
  # item_evaluations: 100000

search:
  optimizer: cma                    # cma | mixed | tpe | gp | nsga2 | random | qmc, or an Optuna sampler
  population_size: null             # null: the optimizer's own choice
  stages:                           # from coarse to fine; each begins at the best of the one before
    # Of a list of spaces, the first is taken that can say the best recipe so far exactly: task arithmetic
    # or TIES, whichever the fixed recipes favour.
    - {space: [global, ties], sigma: 0.15, share: 0.25}           # one weight per model
    - {space: [modules, ties_modules], sigma: 0.12, share: 0.35}  # attention, mlp and the rest apart
    - {space: [blocks, ties_blocks], sigma: 0.1, share: 0.4}      # blocks of layers, attention and mlp apart
  # other ready-made spaces: smooth; lines; mixed (with optimizer mixed or tpe); or a path to your own

fixed:                              # merges without a search: baselines and warm start
  scales: [0.3, 0.5, 0.7, 1.0]      #   of task arithmetic over all models
  subset_scales: [0.5, 0.7, 1.0]    #   of every pair and every leave-one-out
  screen_items: 8                   #   items per task on which they are first scored
  promote: 5                        #   how many are then scored on all calibration items

selection: {top: 4}                 # how many of the search's best meet on the selection items

engine:
  kind: auto                        # auto (vLLM where it is installed) | transformers | vllm
  device: auto                      # auto | cpu | cuda | mps; vLLM: auto
  dtype: auto                       # auto (as stored) | bfloat16 | float16 | float32
  batch_tokens: 8192                # transformers: most tokens of one forward pass over prompts
  cache_gb: null                    # memory for task vectors; null: half of what is free
  options: {}                       # vLLM's own arguments, as {gpu_memory_utilization: 0.8}
  timeout: 600                      # vLLM: seconds without an answer after which it counts as hung

export: {model: false}              # true: write the winner as a model folder, too

# modules: {lm_head: [lm_head]}     # extra tensor groups: name -> regular expressions on tensor names
# storage: sqlite:///study.db       # any Optuna URL instead of a file in the run's folder
seed: 0
"""


def write_template(path: Path) -> None:
    """Write the annotated run file.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError as error:
        raise ConfigError(f"{path}: the file exists; remove it or name another one") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another place") from error
