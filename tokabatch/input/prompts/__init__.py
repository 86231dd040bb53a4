"""From a row to its prompt: template or chat, the special tokens that the row spells, and settings of its own."""
