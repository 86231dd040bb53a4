"""The quickstart's scripts stand beside its model, outside any package: they are imported from their folder."""

from __future__ import annotations

import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[3] / "jobs" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
