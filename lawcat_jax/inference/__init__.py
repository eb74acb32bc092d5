"""Running a trained model: loading a checkpoint for inference and generating text."""
