"""``python -m orchard`` is ``orchard``."""

from orchard.cli import main

if __name__ == "__main__":
    main()
