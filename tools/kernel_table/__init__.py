"""What the compiler makes of the plugin's kernels: see docs/kernels.md."""
