"""What quantization makes of a vision transformer with and without spikes: real DINOv2-small."""
