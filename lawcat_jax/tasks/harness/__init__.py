"""What the task ``lm_eval`` needs of the package lm_eval, which is imported here and nowhere else."""
