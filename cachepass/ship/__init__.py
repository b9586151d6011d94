"""Programs to take along: a cached model as one file, and the file as a callable.

    export    model, inputs, config -> archive        with the compiler: every program, compiled ahead of time
    load      archive, weights -> LoadedModel         without it, and without the model's code
    apply     archive, live model -> the model        whose blocks run the programs

Of the side that compiles:

    size      a call of the model (or of its blocks), captured -> Size
    binding   where a graph's inputs come from, and where its results go
    pieces    a variant's graph -> Listing, graphs of programs
    timetable which program runs in each step of a run, written out

What both sides know:

    listing   Listing: which programs a variant calls, with which values
    manifest  everything that an archive says, as values (``recipe/value.py``)
    records   what lies where in an archive

Of the side that runs:

    loaded    what an archive says -> a program for ``run/``, and its dispatcher
    calls     what is given to a call is checked and put in order
    model     LoadedModel
    trial, content    an archive timed, and shown
"""
