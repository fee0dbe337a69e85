"""What each step trains on: rows, positions, stores and loss settings as pure functions of the step."""
