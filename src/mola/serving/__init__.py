"""What `mola serve` is made of: checks, requests, the queue, answers, routes."""
