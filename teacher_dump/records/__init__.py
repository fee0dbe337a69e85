"""What a record of the input may be (text, a prompt with its answer, a conversation): one file per kind, one table."""
