"""Data sets: files, downloads, made data, augmentation."""
