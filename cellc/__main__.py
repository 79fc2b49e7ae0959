"""`python -m cellc`."""

import sys

from cellc.cli import main

if __name__ == "__main__":  # not in the processes that the demo starts
    sys.exit(main())
