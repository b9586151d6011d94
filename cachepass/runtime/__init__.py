"""What happens on each call of a compiled model: clock, state, program, dispatch."""
