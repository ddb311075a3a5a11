"""Numerical checks of a conversion and of the frameworks' agreement."""
