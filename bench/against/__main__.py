"""Times this checkout against another revision: `python -m bench.against REV MODULE --out DIR`."""

from __future__ import annotations

import argparse
import sys

from ..arguments import output_folder
from ..rows import Writer
from .revision import RevisionError, checkout
from .turns import against


def main() -> int:
    """Measures all parts of a module."""
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=__doc__)
    parser.add_argument("revision", help="what git calls it, or a folder in which it is checked out")
    parser.add_argument("module", help="has the parts, as bench.gpu.revisions does")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--out", type=output_folder, required=True, help="folder of the rows")
    arguments = parser.parse_args()
    try:
        other = str(checkout(arguments.revision))  # before the folder of the rows is made
        slower = against(other, arguments.module, [], arguments.quick, Writer(arguments.out))
    except RevisionError as error:
        parser.error(str(error))
    print("slower than before, beyond the spread: " + ("; ".join(slower) or "nothing"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
