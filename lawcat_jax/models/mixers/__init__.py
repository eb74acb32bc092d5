"""Token mixers: what stands in for softmax attention in a linearised layer."""
