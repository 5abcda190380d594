"""Wrong code on purpose, one piece at a time: do the tests notice? ``make mutants`` runs all of it, CI none of it.

To run::

    make mutants                                   # everything, on two workers
    python -m tests.mutants --only sharding        # by a part of the mutant's name or of its file
    python -m tests.mutants --area kernels_rest    # one module of the catalogue; --list lists and runs nothing
    python -m tests.mutants --changed --jobs 1     # those of files that differ from main

To add a mutant, write a record into ``tests/mutants/catalogue/<area>.py`` (a module with a tuple ``MUTANTS``; a new
module is found by being there)::

    Mutant(
        "merge-empty-lse",                             # a name of its own
        "kernels/attnzoo_kernels/merge.py",            # the file, from the root
        old="live, shift + torch.log(total), -torch.inf",    # its text, there exactly once
        new="live, shift + torch.log(total), 0.0",
        wrong="a row that is empty everywhere gets lse 0",
        tests="tests/attnzoo_kernels/test_merge.py -k empty",    # arguments of pytest: who should notice
        within="merge_states",                         # optional: once in this function, class or Class.method
    )

A good mutant is a mistake that an engineer would make: off by one, the wrong axis, an argument that is not handed on,
two swapped, a check or a copy that is missing. What no test can notice, or none should, says why in ``survives=``; a
mutant that breaks an import on purpose says ``at_import=True``. Choose a short ``old``, and narrow ``tests`` that take
seconds: they first have to pass on the code as it is. Where code has moved, ``--list`` names the mutants that need a
new place; the suite does not ask, so that nobody has to touch this catalogue to change a line.

``record`` says what a mutant is, ``catalogue`` holds them, ``worker`` runs pytest in children of a warm process,
``runner`` hands out the work, ``verdicts`` counts, ``__main__`` is the command.
"""
