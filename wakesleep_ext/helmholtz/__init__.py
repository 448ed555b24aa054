"""Helmholtz machines: networks, the conditionals that they parameterise, chains of conditionals, and losses."""
