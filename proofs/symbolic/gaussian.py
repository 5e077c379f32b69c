"""The normal density and distribution as SymPy expressions."""

from __future__ import annotations

import sympy as sp


def density(y: sp.Expr, mean: sp.Expr, spread: sp.Expr) -> sp.Expr:
    """Normal density at y."""
    return sp.exp(-((y - mean) ** 2) / (2 * spread**2)) / (spread * sp.sqrt(2 * sp.pi))


def normal_cdf(z: sp.Expr) -> sp.Expr:
    """Phi(z), the standard normal distribution function.

    Example:
        >>> normal_cdf(sp.Integer(0))
        1/2
    """
    return (1 + sp.erf(z / sp.sqrt(2))) / 2
