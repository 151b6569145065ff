"""What judges and changes single documents, and what the filters share."""
