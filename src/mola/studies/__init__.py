"""Commands that run several trainings: the quickstart, comparisons, continual learning."""
