"""The model's tokenizer, read from its files, and how texts spell its special tokens."""
