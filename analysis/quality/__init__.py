"""How good an approximation of the curvature is."""
