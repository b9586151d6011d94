"""The ATen graph: what is made of it, down to compiled variants."""
