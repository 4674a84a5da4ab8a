"""Where functions run.

The story: attach to a Ray cluster or start one here (`session`), then run ranks or tasks on it (`launch`).
"""
