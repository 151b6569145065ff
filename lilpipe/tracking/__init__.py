"""MLflow: a parent run for each pipeline run, a nested run for each step, and the registry.

``tracker`` alone decides what is recorded and when; the others each know one thing of MLflow: ``client`` how it is
reached, ``curve`` metrics by step, ``runs`` the runs, ``lineage`` inputs and links, ``registry`` models and versions.
MLflow itself is imported when it is first needed, for that takes more than a second.
"""

from lilpipe.tracking.client import CLIENT_SETTINGS
from lilpipe.tracking.registry import registered_files
from lilpipe.tracking.tracker import MLflowTracker

__all__ = ["CLIENT_SETTINGS", "MLflowTracker", "registered_files"]
