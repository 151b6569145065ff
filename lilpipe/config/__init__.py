"""Configuration: one frozen, typed tree with a section per stage.

Values come from a recipe (``lilpipe.recipes``), then a TOML file, then dotted overrides; see ``recipes.load``. Unknown
settings are errors. Validation is arithmetic and never reads a file.

A field marked ``Operational`` cannot change a stage's output (number of workers, logging interval). It is not part of
the fingerprint, so changing it reruns nothing.

Import each section from its own module, so that a stage depends only on the code of its own settings.
"""
