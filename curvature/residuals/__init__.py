"""Losses that are sums over residuals: what they are, and their Jacobians row by row."""
