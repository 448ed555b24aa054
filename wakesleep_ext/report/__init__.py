"""Plot training runs and their evaluation."""
