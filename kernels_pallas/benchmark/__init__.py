"""Speed, memory and correctness of the kernels on the device at hand: ``python -m kernels_pallas.benchmark``."""
