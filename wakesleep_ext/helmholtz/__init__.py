"""Helmholtz machines: networks, distributions given their output, chains of these, and losses."""
