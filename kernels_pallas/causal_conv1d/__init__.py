"""Causal depthwise convolution over time: shifted products, which XLA fuses into one pass, so no kernel is needed."""
