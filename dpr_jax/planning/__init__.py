"""Ahead-of-time plans for hardware you do not have: memory, bytes moved and roofline bounds."""
