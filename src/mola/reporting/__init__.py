"""Pages about runs and adapters, model cards, and a check of runs for faults."""

REPORT_FILE = "report.html"
