"""The log of a mount: a file, the journal, or the terminal."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys

from pkernfs.errors import RegionError
from pkernfs.options import MountOptions


def start_logging(options: MountOptions) -> None:
    """Log to a file, or to the journal (syslog's socket); warnings of Python itself too.  Raises RegionError."""
    handler: logging.Handler
    path = options.log
    if path:
        try:
            handler = logging.FileHandler(path)
        except OSError as error:
            raise RegionError(f"{path}: cannot write the log: {error.strerror}") from None
        handler.setFormatter(logging.Formatter("%(asctime)s pkernfs[%(process)d]: %(levelname)s: %(message)s"))
    elif os.path.exists("/dev/log") and not options.foreground:
        handler = logging.handlers.SysLogHandler("/dev/log", facility=logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter("pkernfs[%(process)d]: %(levelname)s: %(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("pkernfs: %(levelname)s: %(message)s"))
        if not options.foreground:
            # The terminal of a command that prints nothing when all is well, until that is let go of.
            handler.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.captureWarnings(True)
