"""A recipe: every choice of a run, as TOML with scalars only."""
