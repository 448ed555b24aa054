"""Evaluate a model: bounds, annealed importance sampling, and the distance of dreams from data."""
