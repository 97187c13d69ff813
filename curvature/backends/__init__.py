"""Who measures: hooks, ``torch.func`` and BackPACK fill the same records."""
