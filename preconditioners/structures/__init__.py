"""How the curvature of a layer is stored, inverted and applied."""
