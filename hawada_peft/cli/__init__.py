"""
The command line, `hawada`: each command parses, calls the library, and says what came of it.

A command imports what it needs when it runs.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point of the `hawada` script."""
    try:
        from .program import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print("error: the command line needs typer: pip install 'hawada_peft[cli]'", file=sys.stderr)
        sys.exit(1)
    app()
