"""`python -m cellc`."""

import sys

from cellc.cli import main

sys.exit(main())
