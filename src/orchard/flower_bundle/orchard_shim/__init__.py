"""The app that Flower sends to its nodes."""
