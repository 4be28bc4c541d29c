"""Write docs/operators.md anew from the registered rules.

Usage: python docs/generate_support_table.py
"""

from __future__ import annotations

from pathlib import Path

from autodual.support import support_table, to_markdown

PAGE = Path(__file__).with_name("operators.md")

if __name__ == "__main__":
    PAGE.write_text(to_markdown(support_table(builtin=True)))
