"""What the other tests have: tiny models, and GGUF files of them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
