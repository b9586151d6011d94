"""Rows: one call of a model makes a step of several requests, each at its own."""
