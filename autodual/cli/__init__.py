"""The command line: ``autodual certify``, ``demo``, ``evaluate``, ``explain``, ``operators`` and ``train``.

Exit codes: 0 done; 1 done, but fewer examples certified than ``--require`` asks for; 2 the request cannot be carried
out (one line says why); 3 an attack broke a certified example, which would be a fault of this library.
"""

from __future__ import annotations

from autodual.cli.main import main

__all__ = ["main"]
