"""What a recipe asks of each client, before any weight is loaded."""
