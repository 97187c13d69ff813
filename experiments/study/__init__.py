"""Studies: what is compared, by whom it is run, and what it leaves on disk."""
