"""Throughput of training: the trainer's own steps timed on the devices at hand, beside the same model in PyTorch.

``python -m lawcat_jax.throughput --config=configs/llama1b.py:paper_gpu``; random weights, random tokens, nothing is downloaded.
"""
