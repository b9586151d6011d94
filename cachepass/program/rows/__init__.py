"""Rows: the programs of one request for several of them."""
