"""What a person sees of a run: progress while it goes on, a summary after it, the plan before it. Computes no results."""
