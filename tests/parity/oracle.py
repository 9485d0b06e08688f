"""The real mergekit: many command lines in one process, because starting it takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Runs in the process. What a command line raises goes to `error.txt` in its folder.
DRIVER = """
import json, os, sys, traceback
from importlib.metadata import entry_points
from pathlib import Path
import torch
torch.set_num_threads(1)
scripts = {script.name: script for script in entry_points(group="console_scripts")}
for folder, words in json.load(open(sys.argv[1])):
    os.chdir(folder)
    try:
        scripts[words[0]].load()(words[1:], standalone_mode=False)
    except Exception:
        Path("error.txt").write_text(traceback.format_exc())
"""


def run_mergekit(commands: Mapping[Path, str], home: Path) -> None:
    """Run each command line in its folder; `home` is for mergekit's own files."""
    jobs = home / "jobs.json"
    jobs.write_text(json.dumps([[str(folder), text.split()] for folder, text in commands.items()]))
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(jobs)],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def command(folder: Path, documents: int, cache: Path, seed: int) -> str:
    """The command line for `file.yaml` with this many documents, in `folder`; the result is in `OUT`.

    mergekit remembers models by their paths, so those of the stages must not be relative.
    """
    start = "mergekit-yaml file.yaml OUT"
    if documents > 1:
        start = f"mergekit-multi file.yaml -I {folder}/STAGES --out-path OUT"
    return f"{start} --random-seed {seed} --lora-merge-cache {cache} --lora-merge-dtype float32"
