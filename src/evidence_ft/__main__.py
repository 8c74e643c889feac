"""``python -m evidence_ft``: the command line, see `evidence_ft.cli`."""

import sys

from evidence_ft.cli import main

if __name__ == "__main__":
    sys.exit(main())
