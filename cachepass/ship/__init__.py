"""Programs to take along: a cached model as one file, and the file as a callable.

export    model, inputs, config -> archive        with the compiler: every program, compiled ahead of time
load      archive, weights -> LoadedModel         without it, and without the model's code

pieces    a variant's graph -> Listing, graphs of programs
listing   Listing: which programs a variant calls, with which values
manifest  everything that an archive says, as values (``recipe/value.py``)
binding   where a program's inputs come from, and where its results go
loaded    what is in an archive -> a program for ``run/``
"""
