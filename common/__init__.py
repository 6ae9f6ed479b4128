"""Errors, paths and URLs, atomic files, schemas, memory and devices: what every room may use."""
