"""Plan and run the steps of a pipeline: the command line, a Prefect task and a test all go through here."""
