"""The version of roadie, where every module can read it."""

__version__ = "0.1.0"
