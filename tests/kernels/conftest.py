"""The tests of the kernels share oracle.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
