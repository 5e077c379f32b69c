"""Worlds, engines and claims: run from a checkout, `python -m simulations`."""
