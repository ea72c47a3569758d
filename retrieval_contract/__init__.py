"""What a tensor is, in this project: the one place that server, towers and clients agree on.

Importing it costs numpy and nothing else.
"""
