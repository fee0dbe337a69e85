"""The configuration files of training, evaluation and export, every key described and checked."""
