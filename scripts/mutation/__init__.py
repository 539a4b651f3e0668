"""Small changes of the source, the tests that execute them, and what these say."""
