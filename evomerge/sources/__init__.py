"""What is merged: checkpoints, adapters, and whether they fit together."""
