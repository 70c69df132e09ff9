"""The converter from Hugging Face checkpoints to MLX (installed as `mlx_mtp.convert`); not written yet."""
