"""Helmholtz machines: networks, the conditional distributions that they parameterise, chains of these, and losses."""
