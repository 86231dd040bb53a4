"""The tokenised input on disk: prompts, identities, digests and the columns that the output carries."""
