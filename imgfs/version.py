"""The version, alone in its module so that packaging and every layer can read it."""

VERSION = "0.1.0"
