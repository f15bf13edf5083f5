"""
Resumable work on many pictures: the one place that knows how files are written whole, how the results of other
settings are refused, which files are pictures, and how several processes share the work.
"""
