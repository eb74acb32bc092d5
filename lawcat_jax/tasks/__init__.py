"""Evaluation: passkey retrieval, perplexity, and the tables, JSON files and plots they report."""
