"""`python -m metake`: the command line, where `metake` is not on the path."""

import sys

from metake.cli import main

sys.exit(main())
