"""Trained models written as folders and files that others load."""
