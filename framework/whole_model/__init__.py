"""Optimizers whose curvature couples all parameters: least squares and quasi-Newton methods over the whole model."""
