"""What is asked for and what is recorded of a layer in one mini-batch."""
