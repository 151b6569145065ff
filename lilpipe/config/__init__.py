"""The configuration: one frozen typed tree with a section per stage.

Values come from a recipe (``lilpipe.recipes``), then a TOML file, then dotted overrides; see ``recipes.load``. Unknown
settings are refused. Validation is arithmetic and never touches a file.

A field marked ``Operational`` cannot change a stage's output (a worker count, an interval of logging), so it is
left out of the fingerprint: changing it rebuilds nothing.

Each section is imported from its own module, so that a stage depends on the code of its own settings alone.
"""
