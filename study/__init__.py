"""Studies: the same world model on several representations, and which of them plans best."""
