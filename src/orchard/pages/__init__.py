"""A page about runs that opens in any browser, without a network."""
