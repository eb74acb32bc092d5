"""GGUF files, the format of llama.cpp: weights (quantised or not), configuration and tokenizer in one file."""
