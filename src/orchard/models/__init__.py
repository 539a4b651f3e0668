"""One view of every Mixture-of-Experts model."""

import logging

# PEFT imports bitsandbytes where it is installed, which on some CPUs warns of a kernel that only
# the hub has. Whoever quantizes nothing has no use for that; whoever does has the slower one.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
