"""Optimizers of other packages that run beside the methods: wrapped as their authors use them, never rewritten."""
