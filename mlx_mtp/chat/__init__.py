"""The command `python -m mlx_mtp.chat`: a conversation in the terminal, or through a pipe."""
