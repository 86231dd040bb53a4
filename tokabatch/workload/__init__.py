"""Everything that is settled before the first step: the opened model, and the samples to draw from it."""
