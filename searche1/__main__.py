"""`python -m searche1`, which is what torchrun starts."""

import sys

from searche1.cli import main

if __name__ == "__main__":  # checkpoint writers are spawned and import this module again
    sys.exit(main())
