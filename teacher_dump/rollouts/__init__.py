"""rollout: a model's own answers to the prompts of a tokens store, graded and kept."""
