"""python -m pkernfs.cli: the command ``pkernfs``, where only the interpreter is known and not the path of a script."""

import sys

from pkernfs.cli import main

if __name__ == "__main__":
    sys.exit(main())
