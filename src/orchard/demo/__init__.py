"""A small invented world that shows the methods apart in two minutes."""
