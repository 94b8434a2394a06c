"""One run as one HTML file: what its folder holds, charts and tables of it, the page."""

REPORT_FILE = "report.html"
