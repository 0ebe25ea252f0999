"""What only a GPU can show, in one command there: see docs/gpu-check.md."""
