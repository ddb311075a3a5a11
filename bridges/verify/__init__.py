"""Numerical checks: parity of the frameworks, and of a conversion."""
