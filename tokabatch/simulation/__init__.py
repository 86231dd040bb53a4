"""The scheduler run against a cost model in place of a device: a whole workload's steps and time, without weights."""
