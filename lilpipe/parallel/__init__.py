"""Training a model that is cut over processes, along five dimensions in any product.

``apply`` builds it, ``model`` runs it; the mathematics is that of one process, which the tests hold to rounding.
"""
