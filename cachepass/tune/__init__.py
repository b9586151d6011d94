"""Tune: recipes from measurements.

    recording     one uncached run of a few samples -> Gram matrices of what the cuts were worth in each step
    gram          values of steps -> their inner products, of a sketch of bounded size
    fitting       Gram matrix and computed steps -> weights, and the error that they leave
    schedules     Gram matrix and a number -> which steps are computed
    candidates    what is tried: fixed methods, found schedules, and their neighbours
    search        candidates -> the best for each budget, by runs of the user's own loop
    tuning        the results, as values and as a file

All but ``player`` and ``tune`` are functions of numbers: they know no model and no graph.
"""
