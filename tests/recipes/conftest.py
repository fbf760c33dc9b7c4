"""The recipes are scripts of the repository, not part of the installed package: put the root on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
