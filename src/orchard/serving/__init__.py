"""One base and everybody's personal models, served together."""
