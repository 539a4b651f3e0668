"""Federated methods, one paper a file."""
