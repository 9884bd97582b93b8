"""The version, for every module to read and for the build, which takes it from this text."""

__version__ = "0.1.0"
