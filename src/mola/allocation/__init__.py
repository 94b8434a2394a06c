"""From a score per decoder layer to a number of experts, and where the scores come from."""
