"""One sampling: the override, its decision, its counters and its words."""
