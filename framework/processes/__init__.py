"""Many processes that share a mini-batch: who they are, who owns which layer, and what travels between them."""
