"""Tuning: recipes from measurements.

    tune          the user's door: a budget in, a Tuning out
    work          one call of it: record, search, validate
    cuts          a first look at each cut -> the one to search with
    player        the user's loop with any schedule and weights, from one capture; what its steps kept -> a Gram matrix
    search        candidates -> the best for each budget, by runs of the loop
    candidates    fixed methods, and what the Gram matrix says
    schedules     Gram matrix and a number -> which steps are computed
    fitting       Gram matrix and computed steps -> weights, and the error that they leave
    gram          values of steps -> inner products, of sketches of bounded size
    tuning        what was found, as values, a table and a file
    calibration   numbers that MagCache and TeaCache need

``schedules``, ``fitting`` and ``gram`` are functions of numbers, and know no model.
"""
