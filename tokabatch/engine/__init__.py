"""One replica of the model: executes the steps that the scheduler decides. See `executor` for the boundary."""
