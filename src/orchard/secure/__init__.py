"""Secure aggregation: the sum of many updates, and nothing else of any of them."""
