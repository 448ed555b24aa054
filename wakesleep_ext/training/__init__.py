"""Training: images, the step, the loop and its checkpoints."""
