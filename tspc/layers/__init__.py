"""Factors as modules: layers that compute the same as the dense layers that they replace."""
