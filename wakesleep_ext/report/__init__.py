"""Pictures of runs and of their evaluation."""
