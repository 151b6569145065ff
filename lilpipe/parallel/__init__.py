"""Parallel training in five dimensions, in any combination.

``training.build_sharded`` builds the model, ``training.sharded`` runs it. Results match those of one process up to
rounding, which the tests check.
"""
