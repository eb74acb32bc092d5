"""Training and evaluation data: passkey samples, packed text, and the grain pipeline that serves both."""
