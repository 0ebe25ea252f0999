"""From a model's name to an ONNX graph: find it, fetch it, load it, trace it."""
