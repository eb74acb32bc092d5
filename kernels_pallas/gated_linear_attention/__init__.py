"""Normalised gated linear attention: ``api`` has the ops, the other files their backends (``../README.md``)."""
