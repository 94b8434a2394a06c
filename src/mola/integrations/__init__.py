"""Plug-ins for other trainers: each module makes one of them train mixtures, and is imported by that trainer only."""
