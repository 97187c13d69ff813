"""Curvature between all parameters of a model: damped least squares, and secant updates of one inverse."""
