"""The commands of ``osculate``, one file each."""
