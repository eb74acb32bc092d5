"""What kernels are judged by: a float64 oracle, gate regimes, shapes, inputs and tolerances.

Shipped, because ``python -m kernels_pallas.benchmark --check`` uses it on a device as the tests do on a CPU.
``oracle`` computes outputs and gradients in NumPy; ``cases`` draws inputs, runs an implementation and judges it.
"""
