"""Second-order optimizers for deep networks, composed from small parts."""
