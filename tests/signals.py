"""Ctrl-C for processes that a test starts: in the background of scripts it is ignored, and children inherit that."""

from __future__ import annotations

import sys

_LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
_RUN = "import runpy; runpy.run_module('roadie.cli', run_name='__main__', alter_sys=True)"

COMMAND_LINE = [sys.executable, "-c", _LISTEN + _RUN]
"""`python -m roadie.cli`, interrupted by SIGINT wherever it is started from."""
