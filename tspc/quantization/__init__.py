"""Factors in few bits: grids, rounding with error feedback, and how integers lie in files."""
