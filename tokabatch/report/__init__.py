"""What users see of a run: the plan before it, progress during it, a summary after it. Computes no results."""
