"""Pages about runs and adapters, model cards, and a check of runs for faults."""

REPORT_FILE = "report.html"
CARD_FILE = "README.md"
PLOT_FILE = "loss.png"
