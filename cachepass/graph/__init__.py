"""The passes: graph in, graph out. Nothing here asks which method it serves."""
