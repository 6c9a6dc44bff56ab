"""Bridges to other libraries, each importable only with its extra."""
