"""How good a machine is: bounds, annealed importance sampling, and distances of dreams from data."""
