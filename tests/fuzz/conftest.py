"""The number of inputs of each property: 25, or MOLA_FUZZ_EXAMPLES (`make fuzz`)."""

import os

import hypothesis

EXAMPLES = int(os.environ.get("MOLA_FUZZ_EXAMPLES", "25"))
hypothesis.settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=EXAMPLES,
    print_blob=True,
    derandomize=EXAMPLES <= 100,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
