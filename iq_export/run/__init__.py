"""Running a causal LM's ONNX graph: one session interface, tokenizer, generation."""
