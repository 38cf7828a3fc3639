"""`python -m a3`."""

import sys

from a3.cli import main

sys.exit(main())
