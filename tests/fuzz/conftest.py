"""How many inputs every reader gets: a small number by default, MOLA_FUZZ_EXAMPLES for a long run (`make fuzz`)."""

import os

import hypothesis

EXAMPLES = int(os.environ.get("MOLA_FUZZ_EXAMPLES", "25"))
# Shrinking a long document costs more than it tells; the failing input is printed as it is found.
hypothesis.settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=EXAMPLES,
    print_blob=True,
    derandomize=EXAMPLES <= 100,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
    suppress_health_check=list(hypothesis.HealthCheck),
)
