"""Bases on disk: read whole, in part, or expert by expert; it knows no client and no method."""
