"""The real mergekit: many command lines in one process, because starting it takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Runs in the process: the console scripts' own functions, called with what the shell would give them. What a
# command line raises goes to `error.txt` in its folder.
DRIVER = """
import json, os, sys, traceback
from importlib.metadata import entry_points
from pathlib import Path
import torch
torch.set_num_threads(1)
scripts = {script.name: script for script in entry_points(group="console_scripts")}
for folder, words in json.load(open(sys.argv[1])):
    os.chdir(folder)
    os.environ["PWD"] = folder
    try:
        scripts[words[0]].load()([os.path.expandvars(word) for word in words[1:]], standalone_mode=False)
    except Exception:
        Path("error.txt").write_text(traceback.format_exc())
"""


def run_mergekit(commands: Mapping[Path, str], home: Path) -> None:
    """Run each command line in its folder; `home` is for mergekit's own files.

    A command line that fails leaves `error.txt` in its folder.
    """
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
