"""`python -m a3`."""

import sys

from a3.cli.main import main

sys.exit(main())
