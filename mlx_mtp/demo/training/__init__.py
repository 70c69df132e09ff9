"""How the built-in demo models were made: ``python -m mlx_mtp.demo.training --help``. Needs torch and transformers."""
