"""``python -m autodual.cli``: the same as ``python -m autodual``."""

from __future__ import annotations

import sys

from autodual.cli import main

if __name__ == "__main__":
    sys.exit(main())
