"""What of a model is trained, and under which name; it knows no checkpoint on disk."""
