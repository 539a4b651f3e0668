"""Studies: many runs that answer one question, and what can be said of them."""
