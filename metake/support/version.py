"""The version, in one place: the package's face, its metadata and every record read it here."""

VERSION = "0.1.0"
