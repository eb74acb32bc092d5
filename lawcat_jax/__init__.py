"""LAWCAT in JAX: linearize pretrained transformers, train, evaluate and serve them."""

__version__ = "0.1.0"
