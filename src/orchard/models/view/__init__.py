"""One view of every Mixture-of-Experts model; it knows no adapter, no recipe and no file."""
