"""Factors as modules: layers that act like the dense ones they replace."""
