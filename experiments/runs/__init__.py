"""Training runs: batches, records, progress, comparison, benchmark."""
