"""MLflow tracking: a parent run for each pipeline run, a nested run for each step, and the model registry.

``tracker`` decides what is recorded and when. ``client`` connects to MLflow, ``curve`` sends metrics by step, ``runs``
finds and creates runs, ``lineage`` records inputs and links, ``registry`` models and versions. MLflow is imported on
first use, because the import takes more than a second.
"""

from lilpipe.tracking.client import CLIENT_SETTINGS
from lilpipe.tracking.registry import registered_files
from lilpipe.tracking.tracker import MLflowTracker

__all__ = ["CLIENT_SETTINGS", "MLflowTracker", "registered_files"]
