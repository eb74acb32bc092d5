"""Hugging Face checkpoints: reading, writing, and adapters in PEFT's format."""
