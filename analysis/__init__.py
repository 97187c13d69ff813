"""Floor 4: is it true. Convergence, bounds, approximation quality; grows with the theory it checks."""
