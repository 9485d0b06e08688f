"""These tests are collected only where there is an accelerator: `python -m pytest tests/gpu`."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
