from tests.alignment.conftest import as_workers

__all__ = ["as_workers"]
