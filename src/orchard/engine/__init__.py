"""Who runs a round."""
