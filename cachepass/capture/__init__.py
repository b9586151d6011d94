"""The Dynamo graph: what is in it, and where it is cut."""
