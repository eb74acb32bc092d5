"""Training: attention transfer (stage 1), LoRA finetuning (stage 2) and pretraining of a small teacher."""
