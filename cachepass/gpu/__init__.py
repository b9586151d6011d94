"""Programs for a GPU that is not at hand: compiled for it, counted, and their time estimated."""
