"""Answers over HTTP: checks, requests, the queue, routes. The demonstration is a page of its own."""
