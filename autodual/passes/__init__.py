"""Rewrites of a traced graph, one per file. Each takes a graph and returns a graph that computes the same function."""
