"""`python -m executor` is the command `executor`."""

import sys

from executor.cli import main

sys.exit(main())
