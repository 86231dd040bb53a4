"""The model's tokenizer, read from its files, and what its special tokens are in texts."""
