"""Weights in and out: model directories, Hugging Face checkpoints, adapters."""
