"""One view of every Mixture-of-Experts model."""
