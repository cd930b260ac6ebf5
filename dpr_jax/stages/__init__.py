"""The stages of a run, one a file. Each goes on where it stopped.

A stage that trains restores its own last checkpoint, and returns at once if that is its end. A
system that was evaluated has its file in samples/, and is not evaluated again.
"""
