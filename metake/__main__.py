"""`python -m metake`: the command line, where `metake` is not on the path."""

import sys

from metake.commands.cli import main

sys.exit(main())
