"""Causal depthwise convolution over time: shifted additions, which XLA fuses into one pass."""
