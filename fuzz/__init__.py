"""Wrong input for everything that reads: ``make fuzz``, or ``python -m fuzz --seconds 20``.

targets     bytes -> a reader: files of images, runs, shards and certificates; atheris looks for new paths in them
sweeps      every flag of every analysis, every argument of public functions: one wrong value at a time
corpus      whole files, and inputs that once went wrong, for the first
docs/fuzz.md    what the last committed run found

An input is *refused* (`Refused`), *taken*, *silent* (taken against the docstring) or a *traceback* (all else).
"""
