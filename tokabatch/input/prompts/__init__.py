"""From a row to its prompt: template or chat, special tokens spelled out in the row, and the row's own sampling settings."""
