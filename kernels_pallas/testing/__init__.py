"""What kernels are judged by: a float64 oracle, gate regimes, shapes, inputs and tolerances.

Shipped, because ``python -m kernels_pallas.benchmark --check`` uses it on a device as the tests do on a CPU.
``oracle`` computes outputs and gradients in NumPy; ``cases`` draws inputs of gated linear attention, runs an implementation
and judges it; ``layer_cases`` does so for the whole layer, with padding and packed documents.
"""
