"""Every way of quantizing one traced model, on the same data: `python -m tools.compare`."""
