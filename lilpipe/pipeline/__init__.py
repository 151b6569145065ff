"""Plan and run the steps of a pipeline. The command line, the Prefect task and the tests all use this package."""
