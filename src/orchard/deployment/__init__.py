"""A federation of real sites: what ``orchard coordinate``, ``site``, ``keys`` and ``audit`` do."""
