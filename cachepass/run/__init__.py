"""Each call: whose step it is, what is predicted in it, and what is kept."""
