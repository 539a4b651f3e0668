"""Examples, and which client holds them."""
