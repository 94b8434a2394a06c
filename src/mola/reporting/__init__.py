"""Pages about runs and adapters, model cards, and faults of runs."""

REPORT_FILE = "report.html"
