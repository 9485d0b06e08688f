"""The outer loop: trials, their storage and budget, the honest choice of the winner."""
