"""Evaluation: the loss of a split, generated answers, multiple choice, and safety."""
