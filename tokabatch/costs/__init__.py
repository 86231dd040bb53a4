"""What a step costs: counts of its work, and models that turn them into seconds. Knows no scheduler and no engine."""
