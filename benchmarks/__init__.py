"""Measurements; a package by name, since others install one of the same name."""
