"""Measurements of this machine, each one command: ``orchard bench NAME``."""
