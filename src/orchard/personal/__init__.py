"""Trained models out of a run's folder: opened, and sampled from."""
