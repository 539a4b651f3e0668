"""Which experts, and new ones."""
