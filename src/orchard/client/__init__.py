"""What sits beside private data."""
