"""Measurements. Each prints the card of the machine it ran on; what did not help is in LOG.md."""
