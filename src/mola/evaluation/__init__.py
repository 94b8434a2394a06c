"""Accuracy on examples: questions, answers, scores, and an evaluation that goes on after a stop."""
