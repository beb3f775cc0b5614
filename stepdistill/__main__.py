"""``python -m stepdistill`` is the same as ``stepdistill``."""

from __future__ import annotations

import sys

from stepdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
