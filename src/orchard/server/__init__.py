"""What sits beside nobody's data."""
