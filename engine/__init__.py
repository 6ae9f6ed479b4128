"""The training engine: steps, schedules, ranks, checkpoints, resume and logs. Knows tasks, no model."""
