"""Each call: whose step it is, what is predicted in it, and what is kept.

    Model      a module under one set of compile options, in however many graphs it was captured
    Run        the steps of one trajectory, and all that is kept from step to step
    Call       one call of the model: one step of a run

A graph knows two more, which users never meet:

    Instance   the module that the graph is called for: that of one block serves all blocks of its class
    StepCall   one call of the graph's program: its phase, its weights, the slots it runs on

Where a graph is only a part of its model, ``capture/`` has found its Place in it, and its Siblings: the modules that it
may be called for.
"""
