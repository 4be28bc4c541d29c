"""Walks over a compiled graph that bound its nodes."""
