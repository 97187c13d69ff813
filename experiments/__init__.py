"""Floor 5: problems, training runs, studies, reports and the commands of ``osculate``."""
