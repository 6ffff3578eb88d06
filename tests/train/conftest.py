"""Lets tests, and the programs that they start, import `tiny_task`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
